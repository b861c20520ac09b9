"""Queries, keys, values and the read gate, shared by slots and dense associative memory."""

import torch
from torch import Tensor, nn

from unimatrix.configuration import UniMatrixConfig


class AssociativeProjections(nn.Module):
    """Turn source features into queries, keys and values; gate what was read into the stream.

    Equation: E5 and E6 (inputs), E11 (gate).

    Args:
        config: uses D, C, ``identity_lookup`` and ``identity_values``.
    """

    def __init__(self, config: UniMatrixConfig) -> None:
        super().__init__()
        self.backend = "auto"
        self.key_size = config.slot_key_size
        self.value_size = config.hidden_size
        width = config.hidden_size
        self.query_proj: nn.Module = nn.Identity()
        self.key_proj: nn.Module = nn.Identity()
        self.value_proj: nn.Module = nn.Identity()
        if not config.identity_lookup:
            self.query_proj = nn.Linear(width, self.key_size, bias=False)
            self.key_proj = nn.Linear(width, self.key_size, bias=False)
        if not config.identity_values:
            self.value_proj = nn.Linear(width, width, bias=False)
        self.read_gate = nn.Linear(width, width)

    def forward(self, h: Tensor, context: Tensor) -> Tensor:
        """Return the gated context.

        Args:
            h: [B, T, D], normalised stream of this depth step.
            context: [B, T, D], what the read returned.

        Returns:
            [B, T, D].
        """
        return torch.sigmoid(self.read_gate(h)) * context
