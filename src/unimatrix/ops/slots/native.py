"""Slot decisions in Numba, rows over threads.

The kernel repeats ``decisions.rank_slots``, ``choose_slot`` and ``advance_ages`` on the same
numbers. Only the dot products may be reordered by the compiler: they are exact in any order.
"""
# mypy: allow-untyped-defs

import math
from typing import Any

import numpy as np
import torch

from unimatrix.ops.cosine_read import UNIT_GRID, compute_decision_norms
from unimatrix.ops.numba.compile import kernel, part
from unimatrix.ops.numba.lanes import (
    OPTIONS,
    find_first,
    largest,
    load,
    plus,
    pointer,
    store,
    times,
    zeros,
)
from unimatrix.ops.numba.threads import Shaped, map_rows
from unimatrix.ops.slots.decisions import Allocation, Undecided, prepare_strengths
from unimatrix.ops.slots.slot_state import SlotRules

Array = np.ndarray[Any, Any]
_SLOT_LANES = (0,) * 32
"""Four registers of float64, whose sums need not wait for each other."""


@part(**OPTIONS)
def _find_cosines(lanes, units, i, held, num_panels, cosines):
    """Set row i of ``cosines`` to those of row i of ``units`` with the units of all slots.

    Args:
        lanes: as many zeros as slots stand side by side.
        units: [2, C].
        held: [panels, C, lanes], the slots' units across.
        cosines: [2, panels * lanes].
    """
    size, W = units.shape[1], len(lanes)
    for panel in range(num_panels):
        place = pointer(held, panel * size * W)
        sums = zeros(place, lanes)
        for c in range(size):
            sums = plus(sums, times(load(place, c * W, lanes), units[i, c]))
        store(pointer(cosines, (i * num_panels + panel) * W), 0, sums)


@part(fastmath={"reassoc", "contract", "nsz"})
def _dot(left: Array, i: int, right: Array, j: int) -> float:
    """Return the sum of products of two [C] rows of decision units."""
    total = 0.0
    for c in range(left.shape[1]):
        total += left[i, c] * right[j, c]
    return total


@part()
def _compute_unit(vectors: Array, i: int, norm: float, units: Array, j: int) -> None:
    """Write the decision unit of row i to row j: ``cosine_read.compute_decision_units``."""
    step = norm * UNIT_GRID
    for c in range(vectors.shape[1]):
        unit = np.rint(vectors[i, c] / step) * UNIT_GRID
        units[j, c] = unit if math.isfinite(unit) else 0.0


@part()
def _hold(units: Array, i: int, held: Array, slot: int) -> None:
    """Write row i to a slot's place in [panels, C, lanes]."""
    lanes = held.shape[2]
    for c in range(held.shape[1]):
        held[slot // lanes, c, slot % lanes] = units[i, c]


@part()
def _equal(left: Array, i: int, right: Array, j: int) -> bool:
    """Return whether two [C] rows are the same."""
    same = True
    for c in range(left.shape[1]):  # all of them: several at once
        same &= left[i, c] == right[j, c]
    return same


@part(**OPTIONS)
def _find_largest(lanes, numbers, num_panels):
    """Return the largest of the numbers of all slots and where it is first; -1 if -inf is."""
    found, best = -1, -np.inf
    for panel in range(num_panels):
        row = load(pointer(numbers, panel * len(lanes)), 0, lanes)
        here = largest(row)
        if here > best:
            found, best = panel * len(lanes) + find_first(row, here), here
    return found, best


@part(**OPTIONS)
def _add(lanes, cosines, i, others, num_panels, sums):
    """Set ``sums`` to row i of ``cosines`` and the others."""
    for panel in range(num_panels):
        place = panel * len(lanes)
        row = load(pointer(cosines, i * num_panels * len(lanes) + place), 0, lanes)
        other = load(pointer(others, place), 0, lanes)
        store(pointer(sums, place), 0, plus(row, other))


@part()
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


@kernel()
def _allocate_rows(
    first_row: int,
    last_row: int,
    lanes: tuple[int, ...],  # zeros, as many as slots stand side by side
    queries: Array,  # [B, T, C]
    query_norms: Array,  # [B, T, 1] float64
    keys: Array,  # [B, M + T, C]
    key_norms: Array,  # [B, M + T, 1] float64
    offsets: Array,  # [B, M + T] float64
    entry_filled: Array,  # [B, M + T] bool
    reads: Array,  # [B, T] bool
    writes: Array,  # [B, T] bool
    thresholds: Array,  # [1], the match threshold
    chosen: Array,  # [B, T, K] int64, filled with -1
    writers: Array,  # [B, M] int64, holds 0..M-1
    ages: Array,  # [B, M] int64, holds the initial ages
) -> None:
    num_slots, size = writers.shape[1], keys.shape[2]
    num_panels = (num_slots + len(lanes) - 1) // len(lanes)
    held = np.zeros((num_panels, size, len(lanes)))  # decision units of the slots' keys, across
    room = num_panels * len(lanes)
    filled = np.empty(num_slots, dtype=np.bool_)
    # Added to cosines: -inf where no slot is filled, else nothing, and the slots' offsets.
    closed, slot_offsets = np.full(room, -np.inf), np.full(room, -np.inf)
    ranks = np.empty(room)
    # Of a token's key and of its query. With identity lookup a token writes under the key that the
    # token before it read with: unit and cosines are known then, but for the slot written since.
    units, cosines = np.empty((2, size)), np.empty((2, room))
    query = 0
    for b in range(first_row, last_row):
        for m in range(num_slots):
            filled[m] = entry_filled[b, m]
            closed[m] = 0.0 if filled[m] else -np.inf
            slot_offsets[m] = offsets[b, m] if filled[m] else -np.inf
            _compute_unit(keys[b], m, key_norms[b, m, 0], units, 0)
            _hold(units, 0, held, m)
        written = -1
        for t in range(queries.shape[1]):
            entry = num_slots + t
            key, query = query, 1 - query
            match, closest = -1, -np.inf
            if writes[b, t]:
                repeats = t > 0 and reads[b, t - 1]
                repeats = repeats and query_norms[b, t - 1, 0] == key_norms[b, entry, 0]
                if repeats and _equal(queries[b], t - 1, keys[b], entry):
                    if written >= 0:  # under the key that stands where the query will
                        cosines[key, written] = _dot(units, 0, units, 1)
                else:
                    _compute_unit(keys[b], entry, key_norms[b, entry, 0], units, key)
                    _find_cosines(lanes, units, key, held, num_panels, cosines)
                _add(lanes, cosines, key, closed, num_panels, ranks)
                match, closest = _find_largest(lanes, ranks, num_panels)
            if reads[b, t]:
                _compute_unit(queries[b], t, query_norms[b, t, 0], units, query)
                _find_cosines(lanes, units, query, held, num_panels, cosines)
                _add(lanes, cosines, query, slot_offsets, num_panels, ranks)
                for k in range(chosen.shape[2]):
                    found, _ = _find_largest(lanes, ranks, num_panels)
                    if found < 0:
                        break
                    chosen[b, t, k] = writers[b, found]
                    ranks[found] = -np.inf
            written = -1
            if writes[b, t]:
                slot = _choose_slot(closest, match, filled, ages[b], thresholds[0])
                for m in range(num_slots):
                    ages[b, m] += filled[m]
                ages[b, slot] = 0
                writers[b, slot] = entry
                filled[slot] = entry_filled[b, entry]
                closed[slot] = 0.0 if filled[slot] else -np.inf
                slot_offsets[slot] = offsets[b, entry] if filled[slot] else -np.inf
                _hold(units, key, held, slot)
                written = slot


def allocate_native(tokens: Undecided, rules: SlotRules) -> Allocation:
    """Decide for every token which entries it reads and which slot it writes.

    Equation: E6 (order), E7.

    Cost:
        O(B T M C) time on the CPU, whatever the device of the tensors; no scratch that grows.
    """
    queries, keys, strengths, initial_ages, reads, writes = tokens
    batch, num_tokens, key_size = queries.shape
    num_slots = initial_ages.shape[1]
    chosen = torch.full((batch, num_tokens, rules.slots_per_read), -1, dtype=torch.int64)
    writers = torch.arange(num_slots).repeat(batch, 1)
    ages = initial_ages.to("cpu", copy=True).contiguous()
    inputs = (
        queries,
        compute_decision_norms(queries),
        keys,
        compute_decision_norms(keys),
        *prepare_strengths(strengths, key_size, rules.strength_floor),
        reads,
        writes,
    )
    threshold = torch.tensor([rules.match_threshold], dtype=torch.float64)
    arrays = [*(x.cpu().contiguous() for x in inputs), threshold, chosen, writers, ages]
    work = 2 * queries.numel() * num_slots
    map_rows(_allocate_rows, batch, _SLOT_LANES, *map(Shaped, arrays), work=work)
    return Allocation(*(tensor.to(queries.device) for tensor in (chosen, writers, ages)))
