"""The two-layer feed-forward network of a depth step."""

from torch import Tensor, nn
from torch.nn.functional import gelu

from unimatrix.configuration import UniMatrixConfig


class FeedForward(nn.Module):
    """Apply Linear(D, F), GELU (erf), dropout, Linear(F, D).

    Args:
        config: uses D, F and ``dropout``.
    """

    def __init__(self, config: UniMatrixConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, h: Tensor) -> Tensor:
        """Return the network's output, [B, T, D] for [B, T, D]."""
        output: Tensor = self.down_proj(self.dropout(gelu(self.up_proj(h))))
        return output
