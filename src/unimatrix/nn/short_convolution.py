"""A causal convolution over the last few tokens, one filter a channel."""

import torch
from torch import Tensor, nn

_FIRST_STD = 0.3


class ShortConvolution(nn.Module):
    """Mix each channel over the last tokens, the current one included.

    Equation: E19.
    Source: the short convolution of Mamba (arXiv:2312.00752), here one for queries, keys and
    values together and without an activation.

    Args:
        width: D, channels.
        kernel: K, tokens that a filter sees, at least 2.
    """

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.kernel = kernel
        self.weight = nn.Parameter(torch.empty(kernel, width))

    def list_starts(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Return the filters' start: the current token, and a little of those before."""
        start = _FIRST_STD * torch.randn(self.weight.shape)
        start[-1] += 1.0
        return [(self.weight, start)]

    def forward(
        self, h: Tensor, recent: Tensor | None, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the mixed features and what the next call needs.

        Args:
            h: [B, T, D], real tokens first in each row.
            recent: [B, K - 1, D], features of the tokens before; ``None`` is zeros.
            lengths: [B] int64, real tokens of each row; ``None`` is T for all.

        Returns:
            [B, T, D]; [B, K - 1, D], the features of the last real tokens.
        """
        stream = self._join(h, recent)
        mixed = h * self.weight[-1]
        for tap in range(self.kernel - 1):
            mixed = torch.addcmul(mixed, stream[:, tap : tap + h.shape[1]], self.weight[tap])
        return mixed, self.take_recent(h, recent, lengths)

    def take_recent(self, h: Tensor, recent: Tensor | None, lengths: Tensor | None) -> Tensor:
        """Return the features of the last real tokens, for the next call.

        The arguments are those of ``forward``.
        """
        num_recent = self.kernel - 1
        if lengths is None and h.shape[1] >= num_recent:
            # Copied: a view would keep the whole stream in memory.
            return h[:, h.shape[1] - num_recent :].clone()
        stream = self._join(h, recent)
        if lengths is None:
            return stream[:, stream.shape[1] - num_recent :]
        last = lengths.unsqueeze(1) + torch.arange(num_recent, device=h.device)  # [B, K - 1]
        return stream.gather(1, last.unsqueeze(-1).expand(-1, -1, h.shape[2]))

    def _join(self, h: Tensor, recent: Tensor | None) -> Tensor:
        """Return the stream [B, K - 1 + T, D] with the tokens before in front."""
        if recent is None:
            recent = h.new_zeros(h.shape[0], self.kernel - 1, h.shape[2])
        return torch.cat([recent.to(h.dtype), h], dim=1)
