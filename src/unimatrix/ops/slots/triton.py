"""Slot decisions and the read of the chosen entries in Triton, on a GPU.

The decision kernel repeats ``decisions.rank_slots``, ``choose_slot`` and ``advance_ages`` on the
same numbers, one program a row: the slots' decision units are one float64 tile, and no token waits
for the CPU. The read kernels compute ``cosine_read.read_chosen`` and its gradient without gathers
in memory; the gradients of entries are summed by atomic additions, in no fixed order.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from unimatrix.ops.cosine_read import LOGIT_SCALE, MIN_NORM, compute_decision_units, read_chosen
from unimatrix.ops.operator import declare_operator
from unimatrix.ops.slots.decisions import Allocation, Undecided, prepare_entries
from unimatrix.ops.slots.slot_state import SlotRules

_POSITIONS = 16  # of a program that reads


@triton.jit
def _find_largest(x):
    """Return the largest number and where it is first."""
    return tl.max(x, 0, return_indices=True, return_indices_tie_break_left=True)


@triton.jit
def _allocate_row(
    query_units,  # [B, T, C] float64
    key_units,  # [B, M + T, C] float64
    offsets,  # [B, M + T] float64
    entry_filled,  # [B, M + T] bool
    reads,  # [B, T] bool
    writes,  # [B, T] bool
    threshold,  # [1] float64
    initial_ages,  # [B, M] int64
    chosen,  # [B, T, K] int64, written here as the two after it; holds -1
    writers,  # [B, M] int64
    ages,  # [B, M] int64
    T,
    M: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    SLOTS: tl.constexpr,  # M and C, padded
    WIDTH: tl.constexpr,
):
    OLDER_THAN_ALL: tl.constexpr = 1 << 62  # an unfilled slot
    b = tl.program_id(0).to(tl.int64)
    slot, component = tl.arange(0, SLOTS), tl.arange(0, WIDTH)
    exists, inside = slot < M, component < C
    first = b * (M + T)
    held = tl.load(
        key_units + (first + slot)[:, None] * C + component[None, :],
        mask=exists[:, None] & inside[None, :],
        other=0.0,
    )  # [M, C]
    offset = tl.load(offsets + first + slot, mask=exists, other=0.0)
    filled = tl.load(entry_filled + first + slot, mask=exists, other=0).to(tl.int1)
    age = tl.load(initial_ages + b * M + slot, mask=exists, other=-1)
    writer = slot.to(tl.int64)
    limit = tl.load(threshold)
    for t in range(T):
        entry = first + M + t
        query = tl.load(query_units + (b * T + t) * C + component, mask=inside, other=0.0)
        rank = tl.sum(held * query[None, :], 1) + offset
        is_read = tl.load(reads + b * T + t).to(tl.int1)
        left = filled & is_read
        for k in range(K):
            _, winner = _find_largest(tl.where(left, rank, -float("inf")))
            at = (b * T + t) * K + k + tl.zeros_like(slot)
            tl.store(chosen + at, writer, mask=left & (slot == winner))
            left = left & (slot != winner)
        key = tl.load(key_units + entry * C + component, mask=inside, other=0.0)
        cosine = tl.where(filled, tl.sum(held * key[None, :], 1), -float("inf"))
        closest, match = _find_largest(cosine)
        _, free = _find_largest(tl.where(exists & (filled == 0), OLDER_THAN_ALL, age))
        target = tl.where(closest > limit, match, free)
        is_written = tl.load(writes + b * T + t).to(tl.int1)
        written = (slot == target) & is_written
        age = tl.where(written, 0, age + (filled & is_written).to(tl.int64))
        writer = tl.where(written, M + t, writer)
        held = tl.where(written[:, None], key[None, :], held)
        offset = tl.where(written, tl.load(offsets + entry), offset)
        filled = tl.where(written, tl.load(entry_filled + entry).to(tl.int1), filled)
    tl.store(writers + b * M + slot, writer, mask=exists)
    tl.store(ages + b * M + slot, age, mask=exists)


def choose_warps(num_numbers: int) -> int:
    """Return the warps of a program that holds so many numbers of keys."""
    return min(8, max(1, num_numbers // 512))


def allocate_triton(tokens: Undecided, rules: SlotRules) -> Allocation:
    """Decide for every token which entries it reads and which slot it writes.

    Equation: E6 (order), E7.

    Cost:
        T steps of O(M C) work, all rows at once; the decision units of all entries as scratch.
    """
    queries, keys, strengths, initial_ages, reads, writes = tokens
    (B, T, C), M, K = queries.shape, initial_ages.shape[1], rules.slots_per_read
    entries = prepare_entries(keys, strengths, rules.strength_floor)
    chosen = initial_ages.new_full((B, T, K), -1)
    writers, ages = initial_ages.new_empty(B, M), initial_ages.new_empty(B, M)
    # Not a number in the call: that would be rounded to float32.
    threshold = entries.offsets.new_full((1,), rules.match_threshold)
    slots, width = triton.next_power_of_2(M), triton.next_power_of_2(C)
    with torch.cuda.device_of(queries):
        _allocate_row[B,](
            compute_decision_units(queries),
            *entries,
            reads.contiguous(),
            writes.contiguous(),
            threshold,
            initial_ages.contiguous(),
            chosen,
            writers,
            ages,
            T,
            M,
            C,
            K,
            slots,
            width,
            num_warps=choose_warps(slots * width),
        )
    return Allocation(chosen, writers, ages)


@triton.jit
def _load_rows(x, row, real, column, SIZE: tl.constexpr):
    """Return rows of [P, SIZE]: [positions, columns], 0 where there is none."""
    at = row[:, None] * SIZE + column[None, :]
    return tl.load(x + at, mask=real[:, None] & (column < SIZE)[None, :], other=0.0)


@triton.jit
def _measure(rows, MIN: tl.constexpr):
    """Return max(norm, MIN) of each row."""
    norm = tl.sqrt(tl.sum(rows * rows, 1))
    return tl.where(norm < MIN, MIN, norm)


@triton.jit
def _read_rows(
    queries, keys, values, log_strength, chosen, context, weights, T, num_entries,
    C: tl.constexpr, D: tl.constexpr, K: tl.constexpr,
    WIDTH: tl.constexpr, VALUES: tl.constexpr, READS: tl.constexpr, POSITIONS: tl.constexpr,
    TO_LOGIT: tl.constexpr, SCALE: tl.constexpr, MIN: tl.constexpr,
):  # fmt: skip
    """Store weights [POSITIONS, K] and context [POSITIONS, D]."""
    b = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    component, column, read = tl.arange(0, WIDTH), tl.arange(0, VALUES), tl.arange(0, READS)
    exists = t < T
    query = _load_rows(queries + b * T * C, t, exists, component, C)
    query_norm = _measure(query, MIN)
    logits = tl.full([POSITIONS, READS], -float("inf"), dtype=query.dtype)
    for k in range(K):
        entry = tl.load(chosen + (b * T + t) * K + k, mask=exists, other=-1)
        found = entry >= 0
        key = _load_rows(keys + b * num_entries * C, entry, found, component, C)
        cosine = tl.sum(query * key, 1) / (query_norm * _measure(key, MIN))
        strength = tl.load(log_strength + b * num_entries + entry, mask=found, other=0.0)
        logit = tl.where(found, cosine * TO_LOGIT + strength * SCALE, -float("inf"))
        logits = tl.where(read[None, :] == k, logit[:, None], logits)
    best = tl.max(logits, 1)
    weight = tl.exp(logits - tl.where(best == -float("inf"), 0.0, best)[:, None])
    total = tl.sum(weight, 1)
    weight = weight / tl.where(total == 0.0, 1.0, total)[:, None]
    out = tl.zeros([POSITIONS, VALUES], dtype=query.dtype)
    for k in range(K):
        entry = tl.load(chosen + (b * T + t) * K + k, mask=exists, other=-1)
        value = _load_rows(values + b * num_entries * D, entry, entry >= 0, column, D)
        out += tl.sum(tl.where(read[None, :] == k, weight, 0.0), 1)[:, None] * value
    at, inside = (b * T + t)[:, None], exists[:, None]
    tl.store(weights + at * K + read[None, :], weight, mask=inside & (read < K)[None, :])
    tl.store(context + at * D + column[None, :], out, mask=inside & (column < D)[None, :])


@triton.jit
def _read_backward_rows(
    queries, keys, values, chosen, weights, d_context, d_weights,
    d_queries, d_keys, d_values, d_log_strength, T, num_entries,
    C: tl.constexpr, D: tl.constexpr, K: tl.constexpr,
    WIDTH: tl.constexpr, VALUES: tl.constexpr, POSITIONS: tl.constexpr,
    TO_LOGIT: tl.constexpr, SCALE: tl.constexpr, MIN: tl.constexpr,
):  # fmt: skip
    """Store the gradient of the queries; add to those of the entries, zero before."""
    b = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    component, column = tl.arange(0, WIDTH), tl.arange(0, VALUES)
    exists, first = t < T, b * num_entries
    query = _load_rows(queries + b * T * C, t, exists, component, C)
    query_norm = _measure(query, MIN)
    d_out = _load_rows(d_context + b * T * D, t, exists, column, D)
    mean = tl.zeros([POSITIONS], dtype=query.dtype)
    for k in range(K):
        at = (b * T + t) * K + k
        entry = tl.load(chosen + at, mask=exists, other=-1)
        found = entry >= 0
        weight = tl.load(weights + at, mask=found, other=0.0)
        value = _load_rows(values + first * D, entry, found, column, D)
        slope = tl.sum(value * d_out, 1) + tl.load(d_weights + at, mask=found, other=0.0)
        mean += weight * slope
        place = (first + entry)[:, None] * D + column[None, :]
        mask = found[:, None] & (column < D)[None, :]
        tl.atomic_add(d_values + place, weight[:, None] * d_out, mask=mask)
    d_query = tl.zeros([POSITIONS, WIDTH], dtype=query.dtype)
    for k in range(K):
        at = (b * T + t) * K + k
        entry = tl.load(chosen + at, mask=exists, other=-1)
        found = entry >= 0
        weight = tl.load(weights + at, mask=found, other=0.0)
        value = _load_rows(values + first * D, entry, found, column, D)
        slope = tl.sum(value * d_out, 1) + tl.load(d_weights + at, mask=found, other=0.0)
        change = weight * (slope - mean)  # of the logit
        tl.atomic_add(d_log_strength + first + entry, change * SCALE, mask=found)
        key = _load_rows(keys + first * C, entry, found, component, C)
        key_norm = _measure(key, MIN)
        unit, query_unit = key / key_norm[:, None], query / query_norm[:, None]
        cosine = tl.sum(unit * query_unit, 1)[:, None]
        change = (change * TO_LOGIT)[:, None]
        # A vector at the least norm is divided by a constant: its gradient keeps all directions.
        radial = tl.where(key_norm > MIN, 1.0, 0.0)[:, None] * cosine * unit
        place = (first + entry)[:, None] * C + component[None, :]
        mask = found[:, None] & (component < C)[None, :]
        d_key = change * (query_unit - radial) / key_norm[:, None]
        tl.atomic_add(d_keys + place, d_key, mask=mask)
        radial = tl.where(query_norm > MIN, 1.0, 0.0)[:, None] * cosine * query_unit
        d_query += change * (unit - radial) / query_norm[:, None]
    at = (b * T + t)[:, None] * C + component[None, :]
    tl.store(d_queries + at, d_query, mask=exists[:, None] & (component < C)[None, :])


def _list_sizes(queries: Tensor, values: Tensor, num_read: int) -> dict[str, Any]:
    """Return what the kernels are compiled for."""
    C, D = queries.shape[2], values.shape[2]
    return {
        "C": C,
        "D": D,
        "K": num_read,
        "WIDTH": triton.next_power_of_2(C),
        "VALUES": triton.next_power_of_2(D),
        "POSITIONS": _POSITIONS,
        "TO_LOGIT": LOGIT_SCALE / math.sqrt(C),
        "SCALE": LOGIT_SCALE,
        "MIN": MIN_NORM,
    }


def _run_forward(
    queries: Tensor, keys: Tensor, values: Tensor, log_strength: Tensor, chosen: Tensor
) -> tuple[Tensor, Tensor]:
    (B, T, K), P = chosen.shape, keys.shape[1]
    context, weights = values.new_empty(B, T, values.shape[2]), queries.new_empty(B, T, K)
    inputs = [x.contiguous() for x in (queries, keys, values, log_strength, chosen)]
    with torch.cuda.device_of(queries):
        _read_rows[triton.cdiv(T, _POSITIONS), B](
            *inputs, context, weights, T, P,
            READS=triton.next_power_of_2(K), **_list_sizes(queries, values, K),
        )  # fmt: skip
    return context, weights


def _run_backward(
    queries: Tensor, keys: Tensor, values: Tensor, chosen: Tensor, weights: Tensor,
    d_context: Tensor, d_weights: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    (B, T, K), P = chosen.shape, keys.shape[1]
    d_queries = queries.new_empty(queries.shape)
    of_entries = [x.new_zeros(x.shape) for x in (keys, values, keys[..., 0])]
    inputs = (queries, keys, values, chosen, weights, d_context, d_weights)
    with torch.cuda.device_of(queries):
        _read_backward_rows[triton.cdiv(T, _POSITIONS), B](
            *(x.contiguous() for x in inputs), d_queries, *of_entries, T, P,
            **_list_sizes(queries, values, K),
        )  # fmt: skip
    return d_queries, *of_entries


_read = declare_operator(
    "read_slots_triton",
    _run_forward,
    backward=_run_backward,
    results="context weights",
    gradients="queries keys values log_strength",
)


def read_triton(
    queries: Tensor, keys: Tensor, values: Tensor, log_strength: Tensor, chosen: Tensor
) -> tuple[Tensor, Tensor]:
    """Read as ``cosine_read.read_chosen``, arguments and results; -1 only after all entries.

    Equation: E6 (scores and softmax).

    Cost:
        O(B T K (C + Dv)) time, no gathers kept; once differentiable. Where torch is told to be
        deterministic it is ``cosine_read.read_chosen``.
    """
    if torch.are_deterministic_algorithms_enabled():
        return read_chosen(queries, keys, values, log_strength, chosen)
    context, weights = _read(queries, keys, values, log_strength, chosen)
    return context, weights
