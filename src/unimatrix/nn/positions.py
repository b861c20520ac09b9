"""Positions of real tokens, from a table of limited length."""

import torch
from torch import Tensor, nn

from unimatrix.errors import InputError


def add_positions(
    table: nn.Embedding, x: Tensor, num_before: Tensor, lengths: Tensor | None, is_first: bool
) -> Tensor:
    """Add the embedding of each real token's position.

    Args:
        table: of P positions in D numbers.
        x: [B, T, D], real tokens first in each row.
        num_before: [B] int64, tokens of the stream before these.
        lengths: [B] int64, real tokens of each row; ``None`` is T for all.
        is_first: nothing was read before, which saves a look at ``num_before``.

    Raises:
        InputError: if a row reaches beyond the table.
    """
    num_tokens, num_rows = x.shape[1], table.num_embeddings
    positions = num_before.unsqueeze(1) + torch.arange(num_tokens, device=x.device)
    needed = num_tokens
    if not is_first or lengths is not None:
        needed = int((num_before + (num_tokens if lengths is None else lengths)).max())
    if needed > num_rows:
        raise InputError(
            f"the input reaches {needed} tokens and the position table has {num_rows}; pass "
            "fewer, or train a model with max_position_embeddings=None, which has no table"
        )
    located: Tensor = x + table(positions.clamp(max=num_rows - 1))  # [B, T, D]
    return located
