"""The entries of the dense associative memory, and which of them a position chooses."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

# Cosines are compared as integers, in multiples of 2^-26, with the index as the lower 26 bits.
_RANK_SCALE = 2.0**26


class DenseMemory(NamedTuple):
    """Pairs of key and value, oldest first; grows by T columns a call.

    Attributes:
        keys: [B, P, C], as written (not normalised).
        values: [B, P, Dv].
        valid: [B, P] bool, False where a position wrote nothing.
    """

    keys: Tensor
    values: Tensor
    valid: Tensor


def choose_entries(query_units: Tensor, units: Tensor, visible: Tensor, topk: int) -> Tensor:
    """Choose the entries of largest cosine; no gradient.

    Args:
        query_units: [B, S, C] float64, decision units.
        units: [B, P, C] float64, decision units of the keys.
        visible: [B, S, P] bool, entries that each query may choose.
        topk: K, at most P.

    Returns:
        [B, S, K] int64, best first, -1 where fewer are visible. Cosines equal in multiples of
        2^-26 go to the lowest index: all ranks are distinct integers, so ``topk`` has no ties.
    """
    index = torch.arange(units.shape[1], device=units.device)  # [P]
    rank = query_units @ units.transpose(1, 2)  # [B, S, P]
    rank.mul_(_RANK_SCALE).round_().mul_(_RANK_SCALE).sub_(index)
    best, chosen = rank.masked_fill_(~visible, -math.inf).topk(topk, dim=-1)
    return chosen.masked_fill_(best == -math.inf, -1)
