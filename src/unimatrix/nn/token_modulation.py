"""A factor per token and channel, from a small table of token vectors."""

import torch
from torch import Tensor, nn

from unimatrix.configuration import UniMatrixConfig


class TokenModulation(nn.Module):
    """Scale the stream by 1 + sigmoid(P z[id]) after each depth step.

    Equation: E12.
    Source: paper, section on DeepEmbed.

    Args:
        config: uses V, D and E.
    """

    def __init__(self, config: UniMatrixConfig) -> None:
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.modulation_size)
        self.proj = nn.Linear(config.modulation_size, config.hidden_size, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return the factor of every position.

        Args:
            input_ids: [B, T] int64.

        Returns:
            [B, T, D], values in (1, 2).
        """
        return 1 + torch.sigmoid(self.proj(self.embed(input_ids)))
