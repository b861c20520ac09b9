"""Slot decisions and the read of the chosen entries in Numba, rows over threads.

The decision kernel repeats ``decisions.rank_slots``, ``choose_slot`` and ``advance_ages`` on the
same numbers. Only the dot products may be reordered by the compiler: they are exact in any order.
The read kernels compute ``cosine_read.read_chosen`` and its gradient in one pass each, instead of a
dozen passes over [B, T, K, C] gathers.
"""

import math
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from unimatrix.ops.cosine_read import LOGIT_SCALE, normalise, read_chosen
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


@numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz"})
def _read_rows(
    first_row: int,
    last_row: int,
    queries: Array,  # [B, T, C] unit vectors
    keys: Array,  # [B, P, C] unit vectors
    values: Array,  # [B, P, Dv]
    log_strength: Array,  # [B, P]
    chosen: Array,  # [B, T, K] int64, -1 from where fewer exist
    context: Array,  # [B, T, Dv], zero
    weights: Array,  # [B, T, K], zero
) -> None:
    scale = 1.0 / math.sqrt(queries.shape[2])
    for b in range(first_row, last_row):
        for t in range(queries.shape[1]):
            count = 0
            best = -np.inf
            for k in range(chosen.shape[2]):
                entry = chosen[b, t, k]
                if entry < 0:
                    break
                cosine = 0.0
                for c in range(queries.shape[2]):
                    cosine += queries[b, t, c] * keys[b, entry, c]
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
                for i in range(values.shape[2]):
                    context[b, t, i] += weight * values[b, entry, i]


@numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz"})
def _read_backward_rows(
    first_row: int,
    last_row: int,
    queries: Array,  # [B, T, C] unit vectors
    keys: Array,  # [B, P, C] unit vectors
    values: Array,  # [B, P, Dv]
    chosen: Array,  # [B, T, K] int64
    weights: Array,  # [B, T, K]
    d_context: Array,  # [B, T, Dv]
    d_weights: Array,  # [B, T, K]
    d_queries: Array,  # zero, as the four after it
    d_keys: Array,
    d_values: Array,
    d_log_strength: Array,
) -> None:
    scale = 1.0 / math.sqrt(queries.shape[2])
    slopes = np.empty(chosen.shape[2])
    for b in range(first_row, last_row):
        for t in range(queries.shape[1]):
            count = 0
            mean = 0.0
            for k in range(chosen.shape[2]):
                entry = chosen[b, t, k]
                if entry < 0:
                    break
                slope = 0.0
                for i in range(values.shape[2]):
                    slope += d_context[b, t, i] * values[b, entry, i]
                    d_values[b, entry, i] += weights[b, t, k] * d_context[b, t, i]
                slopes[k] = slope + d_weights[b, t, k]
                mean += weights[b, t, k] * slopes[k]
                count += 1
            for k in range(count):
                entry = chosen[b, t, k]
                d_score = LOGIT_SCALE * weights[b, t, k] * (slopes[k] - mean)
                d_log_strength[b, entry] += d_score
                d_cosine = d_score * scale
                for c in range(queries.shape[2]):
                    d_queries[b, t, c] += d_cosine * keys[b, entry, c]
                    d_keys[b, entry, c] += d_cosine * queries[b, t, c]


class _Read(torch.autograd.Function):
    """The read of chosen entries from unit queries and unit keys."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return context [B, T, Dv] and weights [B, T, K]."""
        inputs = tuple(tensor.contiguous() for tensor in inputs)
        queries, keys, values, _, chosen = inputs
        context = values.new_zeros((*queries.shape[:2], values.shape[2]))
        weights = queries.new_zeros(chosen.shape)
        arrays = [tensor.detach().numpy() for tensor in (*inputs, context, weights)]
        map_rows(_read_rows, queries.shape[0], *arrays)
        ctx.save_for_backward(queries, keys, values, chosen, weights)
        return context, weights

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of queries, keys, values and log strength."""
        queries, keys, values, chosen, weights = ctx.saved_tensors
        found = [torch.zeros_like(x) for x in (queries, keys, values, keys[..., 0])]
        given = [x.contiguous() for x in (queries, keys, values, chosen, weights, *grads)]
        arrays = [tensor.detach().numpy() for tensor in (*given, *found)]
        map_rows(_read_backward_rows, queries.shape[0], *arrays)
        return (*found, None)


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
    read: tuple[Tensor, Tensor] = _Read.apply(
        normalise(queries), normalise(keys), values, log_strength, chosen
    )
    return read
