"""Slot decisions and the read of the chosen entries in Numba, rows over threads.

The decision kernel repeats ``decisions.rank_slots``, ``choose_slot`` and ``advance_ages`` on the
same numbers. Only the dot products may be reordered by the compiler: they are exact in any order.
The read kernels compute ``cosine_read.read_chosen`` and its gradient in one pass each, instead of a
dozen passes over [B, T, K, C] gathers.
"""
# mypy: allow-untyped-defs

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unimatrix.ops.cosine_read import (
    LOGIT_SCALE,
    MIN_NORM,
    UNIT_GRID,
    compute_decision_norms,
    read_chosen,
)
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
from unimatrix.ops.numba.products import LANES
from unimatrix.ops.numba.threads import Shaped, map_rows
from unimatrix.ops.numba.tiles import add_multiple, multiply_rows
from unimatrix.ops.operator import declare_operator
from unimatrix.ops.slots.decisions import Allocation, prepare_strengths
from unimatrix.ops.slots.slot_state import SlotRules

Array = np.ndarray[Any, Any]
_SLOT_LANES = (0,) * 32  # four registers of float64: their sums need not wait for each other


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


def allocate_native(
    queries: Tensor, keys: Tensor, strengths: Tensor, initial_ages: Tensor, *, reads: Tensor,
    writes: Tensor, rules: SlotRules,
) -> Allocation:  # fmt: skip
    """Decide for every token which entries it reads and which slot it writes.

    Equation: E6 (order), E7.

    Args:
        queries: [B, T, C], float32 or float64.
        keys: [B, M + T, C], those of the initial slots, then those of the tokens.
        strengths: [B, M + T].
        initial_ages: [B, M] int64.
        reads: [B, T] bool.
        writes: [B, T] bool.
        rules: K, match threshold, strength floor.

    Returns:
        the allocation, on the device of ``queries``.

    Cost:
        O(B T M C) time on the CPU, whatever the device of the tensors; no scratch that grows.
    """
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
    given = [*(tensor.cpu().contiguous() for tensor in inputs), threshold, chosen, writers, ages]
    work = 2 * queries.numel() * num_slots
    map_rows(_allocate_rows, batch, _SLOT_LANES, *map(Shaped, given), work=work)
    return Allocation(*(tensor.to(queries.device) for tensor in (chosen, writers, ages)))


@part(fastmath={"reassoc", "contract", "nsz"})
def _compute_norm(vectors: Array, i: int) -> float:
    """Return max(norm, 1e-12) of one [C] row."""
    total = 0.0
    for c in range(vectors.shape[1]):
        total += vectors[i, c] * vectors[i, c]
    return max(math.sqrt(total), MIN_NORM)


@kernel()
def _norm_rows(first_row: int, last_row: int, vectors: Array, norms: Array) -> None:
    """Write max(norm, 1e-12) of rows of [R, C] to ``norms``."""
    for i in range(first_row, last_row):
        norms[i] = _compute_norm(vectors, i)


@part(fastmath={"reassoc", "contract", "nsz"})
def _leave_sphere(vectors: Array, grads: Array, i: int, norm: float) -> None:
    """Turn the gradient of a row's unit vector into that of the row, in place."""
    along = 0.0
    if norm > MIN_NORM:
        for c in range(vectors.shape[1]):
            along += grads[i, c] * vectors[i, c]
        along /= norm * norm
    scale = 1.0 / norm
    for c in range(vectors.shape[1]):
        grads[i, c] = scale * (grads[i, c] - along * vectors[i, c])


@kernel(fastmath={"reassoc", "contract", "nsz"})
def _read_rows(
    first_row: int,
    last_row: int,
    queries: Array,  # [B, T, C]
    keys: Array,  # [B, P, C]
    values: Array,  # [B, P, Dv]
    log_strength: Array,  # [B, P]
    chosen: Array,  # [B, T, K] int64, -1 from where fewer exist
    key_norms: Array,  # [B, P]
    context: Array,  # [B, T, Dv], written here
    weights: Array,  # [B, T, K], written here
) -> None:
    """Read at positions b T + t."""
    scale = 1.0 / math.sqrt(queries.shape[2])
    for row in range(first_row, last_row):
        b, t = row // queries.shape[1], row % queries.shape[1]
        count = 0
        best = -np.inf
        size, width = queries.shape[2], values.shape[2]
        query = pointer(queries, row * size)
        query_norm = _compute_norm(queries[b], t)
        context[b, t] = 0.0
        weights[b, t] = 0.0
        for k in range(chosen.shape[2]):
            entry = chosen[b, t, k]
            if entry < 0:
                break
            place = (b * keys.shape[1] + entry) * size
            cosine = multiply_rows(LANES, query, pointer(keys, place), size)
            cosine /= query_norm * key_norms[b, entry]
            logit = LOGIT_SCALE * (cosine * scale + log_strength[b, entry])
            weights[b, t, k] = logit
            best = max(best, logit)
            count += 1
        total = 0.0
        for k in range(count):
            weight = math.exp(weights[b, t, k] - best)
            weights[b, t, k] = weight
            total += weight
        for k in range(count):
            weight = weights[b, t, k] / total
            weights[b, t, k] = weight
            entry = chosen[b, t, k]
            value = pointer(values, (b * values.shape[1] + entry) * width)
            add_multiple(LANES, value, weight, width, pointer(context, row * width))


@kernel(fastmath={"reassoc", "contract", "nsz"})
def _query_gradient_rows(
    first_row: int,
    last_row: int,
    queries: Array,  # [B, T, C]
    keys: Array,  # [B, P, C]
    values: Array,  # [B, P, Dv]
    chosen: Array,  # [B, T, K] int64
    key_norms: Array,  # [B, P]
    weights: Array,  # [B, T, K]
    d_context: Array,  # [B, T, Dv]
    d_weights: Array,  # [B, T, K]
    d_scores: Array,  # [B, T, K], written here: by the score of each read
    shares: Array,  # [B, T, K], written here: by a key, in multiples of the query
    d_queries: Array,  # [B, T, C], written here
) -> None:
    """Find the gradients at positions b T + t, which no other position has part in."""
    scale = 1.0 / math.sqrt(queries.shape[2])
    for row in range(first_row, last_row):
        b, t = row // queries.shape[1], row % queries.shape[1]
        count = 0
        mean = 0.0
        size, width = queries.shape[2], values.shape[2]
        query_norm = _compute_norm(queries[b], t)
        d_queries[b, t] = 0.0
        for k in range(chosen.shape[2]):
            entry = chosen[b, t, k]
            if entry < 0:
                break
            value = pointer(values, (b * values.shape[1] + entry) * width)
            slope = multiply_rows(LANES, pointer(d_context, row * width), value, width)
            d_scores[b, t, k] = slope + d_weights[b, t, k]
            mean += weights[b, t, k] * d_scores[b, t, k]
            count += 1
        for k in range(count):
            entry = chosen[b, t, k]
            d_score = LOGIT_SCALE * weights[b, t, k] * (d_scores[b, t, k] - mean)
            d_scores[b, t, k] = d_score
            # Gradients of the unit vectors first: they are summed before they are projected.
            shares[b, t, k] = d_score * scale / query_norm
            from_key = d_score * scale / key_norms[b, entry]
            key = pointer(keys, (b * keys.shape[1] + entry) * size)
            add_multiple(LANES, key, from_key, size, pointer(d_queries, row * size))
        _leave_sphere(queries[b], d_queries[b], t, query_norm)


@kernel(fastmath={"reassoc", "contract", "nsz"})
def _entry_gradient_rows(
    first_row: int,
    last_row: int,
    num_parts: int,
    queries: Array,  # [B, T, C]
    chosen: Array,  # [B, T, K] int64
    weights: Array,  # [B, T, K]
    d_context: Array,  # [B, T, Dv]
    d_scores: Array,  # [B, T, K]
    shares: Array,  # [B, T, K]
    d_keys: Array,  # [B, P, C], written here, as the two after it
    d_values: Array,  # [B, P, Dv]
    d_log_strength: Array,  # [B, P]
) -> None:
    """Sum the gradients of a sequence's entries, each part some columns of keys and values."""
    for row in range(first_row, last_row):
        b, part = row // num_parts, row % num_parts
        size, width = d_keys.shape[2], d_values.shape[2]
        first_key, last_key = part * size // num_parts, (part + 1) * size // num_parts
        first_value, last_value = part * width // num_parts, (part + 1) * width // num_parts
        d_keys[b, :, first_key:last_key] = 0.0
        d_values[b, :, first_value:last_value] = 0.0
        if part == 0:
            d_log_strength[b] = 0.0
        for t in range(queries.shape[1]):
            position = b * queries.shape[1] + t
            for k in range(chosen.shape[2]):
                entry = chosen[b, t, k]
                if entry < 0:
                    break
                place = b * d_keys.shape[1] + entry
                along = pointer(d_context, position * width + first_value)
                target = pointer(d_values, place * width + first_value)
                add_multiple(LANES, along, weights[b, t, k], last_value - first_value, target)
                query = pointer(queries, position * size + first_key)
                target = pointer(d_keys, place * size + first_key)
                add_multiple(LANES, query, shares[b, t, k], last_key - first_key, target)
                if part == 0:
                    d_log_strength[b, entry] += d_scores[b, t, k]


@kernel()
def _leave_sphere_rows(
    first_row: int, last_row: int, vectors: Array, norms: Array, grads: Array
) -> None:
    """Turn gradients of the unit vectors of rows of [R, C] into those of the rows."""
    for i in range(first_row, last_row):
        _leave_sphere(vectors, grads, i, norms[i])


def _run_forward(
    queries: Tensor, keys: Tensor, values: Tensor, log_strength: Tensor, chosen: Tensor
) -> tuple[Tensor, ...]:
    keys = keys.contiguous()
    context = values.new_empty((*queries.shape[:2], values.shape[2]))
    weights, key_norms = queries.new_empty(chosen.shape), keys.new_empty(keys.shape[:2])
    rows = Shaped(keys.flatten(0, 1)), Shaped(key_norms.view(-1))
    map_rows(_norm_rows, key_norms.numel(), *rows, work=keys.numel())
    inputs = (x.contiguous() for x in (queries, keys, values, log_strength, chosen))
    arrays = map(Shaped, (*inputs, key_norms, context, weights))
    work = chosen.numel() * (queries.shape[2] + values.shape[2])
    map_rows(_read_rows, chosen.shape[0] * chosen.shape[1], *arrays, work=work)
    return context, weights, key_norms


def _run_backward(
    queries: Tensor, keys: Tensor, values: Tensor, chosen: Tensor, key_norms: Tensor,
    weights: Tensor, d_context: Tensor, d_weights: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    inputs = (queries, keys, values, chosen, key_norms, weights, d_context, d_weights)
    queries, keys, values, chosen, *others = (x.contiguous() for x in inputs)
    d_context = others[2]
    d_queries, d_keys, d_values, d_log_strength = (
        torch.empty_like(x) for x in (queries, keys, values, key_norms)
    )
    d_scores, shares = torch.zeros_like(weights), torch.zeros_like(weights)
    batch, num_tokens = chosen.shape[:2]
    work = chosen.numel() * (queries.shape[2] + values.shape[2])
    arrays = map(Shaped, (queries, keys, values, chosen, *others, d_scores, shares, d_queries))
    map_rows(_query_gradient_rows, batch * num_tokens, *arrays, work=work)
    # Where there are fewer sequences than threads, each takes some columns.
    num_parts = -(-torch.get_num_threads() // batch)
    of_reads = (queries, chosen, weights, d_context, d_scores, shares)
    arrays = map(Shaped, (*of_reads, d_keys, d_values, d_log_strength))
    map_rows(_entry_gradient_rows, batch * num_parts, num_parts, *arrays, work=work)
    arrays = map(Shaped, (keys.flatten(0, 1), key_norms.view(-1), d_keys.flatten(0, 1)))
    map_rows(_leave_sphere_rows, key_norms.numel(), *arrays, work=keys.numel())
    return d_queries, d_keys, d_values, d_log_strength


_read = declare_operator(
    "read_slots",
    _run_forward,
    backward=_run_backward,
    results="context weights",
    saved="key_norms",
    gradients="queries keys values log_strength",
)


def read_native(
    queries: Tensor, keys: Tensor, values: Tensor, log_strength: Tensor, chosen: Tensor
) -> tuple[Tensor, Tensor]:
    """Weigh the chosen entries of each position by a softmax and sum their values.

    Equation: E6 (scores and softmax).

    Args:
        queries: [B, T, C], float32 or float64.
        keys: [B, P, C].
        values: [B, P, Dv].
        log_strength: [B, P] in nats.
        chosen: [B, T, K] int64, entries of each position, -1 from where there are fewer.

    Returns:
        context [B, T, Dv] and weights [B, T, K]; 0 where nothing is chosen.

    Cost:
        O(B T K (C + Dv)) time, no gathers kept; once differentiable. Off the CPU it is
        ``cosine_read.read_chosen``.
    """
    if queries.device.type != "cpu":
        return read_chosen(queries, keys, values, log_strength, chosen)
    context, weights = _read(queries, keys, values, log_strength, chosen)
    return context, weights
