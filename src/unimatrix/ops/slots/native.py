"""Slot decisions in Numba: one pass over the tokens of a row, rows over threads.

The kernel repeats ``decisions.rank_slots``, ``choose_slot`` and ``advance_ages`` on the same
numbers. Only the dot products may be reordered by the compiler: they are exact in any order.
"""

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from unimatrix.ops.slots.decisions import Allocation, DecisionEntries
from unimatrix.ops.slots.slot_state import SlotRules
from unimatrix.ops.threads import map_rows

Array = np.ndarray[Any, Any]

# Below this many multiply-adds one thread is done before another has started.
_MIN_THREADED_WORK = 1 << 19


@numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz"})
def _dot(left: Array, right: Array) -> float:
    """Return the sum of products of two [C] rows of decision units."""
    total = 0.0
    for c in range(left.shape[0]):
        total += left[c] * right[c]
    return total


@numba.njit(nogil=True, cache=True)
def _insert(ranks: Array, slots: Array, count: int, rank: float, slot: int) -> int:
    """Insert ``slot`` into the best K, sorted by rank; return how many there are."""
    last: int = min(count, ranks.shape[0] - 1)
    if count == ranks.shape[0] and rank <= ranks[last]:
        return count
    place = last
    while place > 0 and rank > ranks[place - 1]:
        ranks[place] = ranks[place - 1]
        slots[place] = slots[place - 1]
        place -= 1
    ranks[place] = rank
    slots[place] = slot
    return last + 1


@numba.njit(nogil=True, cache=True)
def _choose_slot(closest: float, match: int, filled: Array, ages: Array, threshold: float) -> int:
    """Return the slot to write: a match, else the first unfilled, else the oldest."""
    if closest > threshold:
        return match
    oldest = 0
    for m in range(filled.shape[0]):
        if not filled[m]:
            return m
        if ages[m] > ages[oldest]:
            oldest = m
    return oldest


@numba.njit(nogil=True, cache=True)
def _allocate_rows(
    first_row: int,
    last_row: int,
    queries: Array,  # [B, T, C] float64
    units: Array,  # [B, M + T, C] float64
    offsets: Array,  # [B, M + T] float64
    entry_filled: Array,  # [B, M + T] bool
    reads: Array,  # [B, T] bool
    writes: Array,  # [B, T] bool
    threshold: float,
    chosen: Array,  # [B, T, K] int64, filled with -1
    writers: Array,  # [B, M] int64, holds 0..M-1
    ages: Array,  # [B, M] int64, holds the initial ages
) -> None:
    num_slots = writers.shape[1]
    ranks = np.empty(chosen.shape[2])
    best = np.empty(chosen.shape[2], dtype=np.int64)
    filled = np.empty(num_slots, dtype=np.bool_)
    for b in range(first_row, last_row):
        filled[:] = entry_filled[b, :num_slots]
        for t in range(queries.shape[1]):
            count = 0
            closest = -np.inf
            match = 0
            for m in range(num_slots):
                if not filled[m]:
                    continue
                held = units[b, writers[b, m]]
                if reads[b, t]:
                    rank = _dot(queries[b, t], held) + offsets[b, writers[b, m]]
                    count = _insert(ranks, best, count, rank, m)
                if writes[b, t]:
                    cosine = _dot(units[b, num_slots + t], held)
                    if cosine > closest:
                        closest = cosine
                        match = m
            for k in range(count):
                chosen[b, t, k] = writers[b, best[k]]
            if writes[b, t]:
                slot = _choose_slot(closest, match, filled, ages[b], threshold)
                for m in range(num_slots):
                    ages[b, m] += filled[m]
                ages[b, slot] = 0
                writers[b, slot] = num_slots + t
                filled[slot] = entry_filled[b, num_slots + t]


def allocate_native(
    query_units: Tensor,
    entries: DecisionEntries,
    initial_ages: Tensor,
    *,
    reads: Tensor,
    writes: Tensor,
    rules: SlotRules,
) -> Allocation:
    """Decide for every token which entries it reads and which slot it writes.

    Equation: E6 (order), E7.

    Args:
        query_units: [B, T, C] float64.
        entries: the initial slots, then the T tokens.
        initial_ages: [B, M] int64.
        reads: [B, T] bool.
        writes: [B, T] bool.
        rules: K, match threshold, strength floor.

    Returns:
        the allocation, on the device of ``query_units``.

    Cost:
        O(B T M C) time on the CPU, whatever the device of the tensors; no scratch that grows.
    """
    batch, num_tokens = query_units.shape[:2]
    num_slots = initial_ages.shape[1]
    chosen = torch.full((batch, num_tokens, rules.slots_per_read), -1, dtype=torch.int64)
    writers = torch.arange(num_slots).repeat(batch, 1)
    ages = initial_ages.to("cpu", copy=True).contiguous()
    inputs = (query_units, *entries, reads, writes)
    arrays = [tensor.cpu().contiguous().numpy() for tensor in inputs]
    results = [tensor.numpy() for tensor in (chosen, writers, ages)]
    arguments = (*arrays, float(rules.match_threshold), *results)
    if 2 * query_units.numel() * num_slots < _MIN_THREADED_WORK:
        _allocate_rows(0, batch, *arguments)
    else:
        map_rows(_allocate_rows, batch, *arguments)
    return Allocation(*(tensor.to(query_units.device) for tensor in (chosen, writers, ages)))
