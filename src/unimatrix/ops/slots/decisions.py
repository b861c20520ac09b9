"""Which slots are read and which one is written: integer decisions without gradient.

All back ends decide on the same numbers, computed once by ``prepare_entries``: decision units
(``ops.cosine_read``: their cosines are exact) and read offsets. The rank of slot m for a query is
sqrt(C) times the read score E6,

    rank = cos(query, key_m) + sqrt(C) ln(max(strength_m, 1e-4)),

one rounded addition of two numbers that are the same everywhere; the second is a multiple of
2^-26. Ties go to the lowest slot index. The kernel in ``native.py`` repeats ``rank_slots`` and
``choose_slot`` in loops.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from unimatrix.ops.cosine_read import compute_decision_units, move_to_decisions, round_to_grid

MIN_STRENGTH = 1e-4


class DecisionEntries(NamedTuple):
    """Everything a decision may look at, for P entries.

    Attributes:
        units: [B, P, C] float64, decision units of the keys.
        offsets: [B, P] float64, sqrt(C) ln(max(strength, 1e-4)), multiples of 2^-26.
        filled: [B, P] bool, whether a slot with this strength is filled.
    """

    units: Tensor
    offsets: Tensor
    filled: Tensor


class Undecided(NamedTuple):
    """What T tokens bring to M slots, for a back end to decide on.

    Attributes:
        queries: [B, T, C], float32 or float64.
        keys: [B, M + T, C], those of the initial slots, then those of the tokens.
        strengths: [B, M + T].
        initial_ages: [B, M] int64.
        reads: [B, T] bool.
        writes: [B, T] bool.
    """

    queries: Tensor
    keys: Tensor
    strengths: Tensor
    initial_ages: Tensor
    reads: Tensor
    writes: Tensor


class Allocation(NamedTuple):
    """Which entry each position reads and each slot ends with.

    Entries are the initial slots 0..M-1, then the tokens M..M+T-1.

    Attributes:
        chosen: [B, T, K] int64, best first, -1 where fewer than K slots are filled.
        writers: [B, M] int64, the entry in each slot after the last token.
        ages: [B, M] int64.
    """

    chosen: Tensor
    writers: Tensor
    ages: Tensor


def prepare_strengths(
    strengths: Tensor, key_size: int, strength_floor: float
) -> tuple[Tensor, Tensor]:
    """Return what decisions look at beside the keys: offsets and whether a slot is filled.

    Args:
        strengths: [B, P], any float.
        key_size: C.
        strength_floor: a strength above it fills a slot, compared in float64.

    Returns:
        [B, P] float64 and [B, P] bool, as in ``DecisionEntries``.
    """
    wide = move_to_decisions(strengths).double()
    offsets = math.sqrt(key_size) * wide.clamp_min(MIN_STRENGTH).log()
    return round_to_grid(offsets).contiguous(), (wide > strength_floor).contiguous()


def prepare_entries(keys: Tensor, strengths: Tensor, strength_floor: float) -> DecisionEntries:
    """Compute what decisions look at.

    Args:
        keys: [B, P, C], any float.
        strengths: [B, P], any float.
        strength_floor: a strength above it fills a slot, compared in float64.

    Returns:
        the entries, without gradient.
    """
    offsets, filled = prepare_strengths(strengths, keys.shape[-1], strength_floor)
    return DecisionEntries(compute_decision_units(keys), offsets, filled)


def rank_slots(query_units: Tensor, slots: DecisionEntries, num_chosen: int) -> Tensor:
    """Return the best filled slots of one token.

    Args:
        query_units: [B, C] float64.
        slots: the M slots as entries.
        num_chosen: K, at most M.

    Returns:
        [B, K] int64 slot indices, best first, ties to the lowest, -1 where fewer are filled.
    """
    cosine = (slots.units @ query_units.unsqueeze(-1)).squeeze(-1)  # [B, M]
    rank = (cosine + slots.offsets).masked_fill(~slots.filled, -math.inf)
    best, order = rank.sort(dim=-1, descending=True, stable=True)
    return order.masked_fill(best == -math.inf, -1)[:, :num_chosen]


def choose_slot(
    key_units: Tensor, slots: DecisionEntries, ages: Tensor, match_threshold: float
) -> Tensor:
    """Return the slot that one token writes: a match, else the first unfilled, else the oldest.

    Args:
        key_units: [B, C] float64.
        slots: the M slots as entries.
        ages: [B, M] int64.
        match_threshold: the best cosine over filled slots must exceed it for a match.

    Returns:
        [B] int64, ties to the lowest index.
    """
    cosine = (slots.units @ key_units.unsqueeze(-1)).squeeze(-1)  # [B, M]
    cosine = cosine.masked_fill(~slots.filled, -math.inf)
    match = cosine.argmax(dim=-1)
    closest = cosine.gather(1, match.unsqueeze(1)).squeeze(1)
    unfilled = (~slots.filled).long().argmax(dim=-1)
    available = torch.where(slots.filled.all(dim=-1), ages.argmax(dim=-1), unfilled)
    return torch.where(closest > match_threshold, match, available)


def advance_ages(ages: Tensor, filled: Tensor, written: Tensor) -> Tensor:
    """Return the ages after one token.

    Args:
        ages: [B, M] int64.
        filled: [B, M] bool, before the write.
        written: [B, M] bool, the slot this token writes; all False in a row that does not write.

    Returns:
        [B, M]: filled slots of a row that writes are one older, the written slot is 0.
    """
    ages = ages + (filled & written.any(dim=-1, keepdim=True)).long()
    return ages.masked_fill(written, 0)
