"""Attention around places, compiled: neighbours that read the same columns read them together."""
# mypy: allow-untyped-defs

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from unimatrix.ops.indexed_attention.boundaries_native import (
    add_boundary_gradients,
    sum_boundaries,
)
from unimatrix.ops.indexed_attention.entries import MOST_MATCHED, NUM_OFFSETS
from unimatrix.ops.indexed_attention.runs_native import (
    copy_numbers,
    find_run,
    gather_keys,
    gather_values,
    has_entries,
    turn_rows,
)
from unimatrix.ops.numba.compile import kernel, part
from unimatrix.ops.numba.lanes import (
    OPTIONS,
    at,
    exponential,
    keep,
    larger,
    largest,
    load,
    plus,
    pointer,
    store,
    times,
    total,
    where_negative,
    zeros,
)
from unimatrix.ops.numba.products import LANES, multiply
from unimatrix.ops.numba.threads import run_rows
from unimatrix.ops.numba.tiles import add_multiple
from unimatrix.ops.operator import declare_operator


class _AttendForm(NamedTuple):
    """Options of the kernels as tuples, since Numba compiles a kernel for their lengths."""

    lanes: tuple[int, ...]
    bounds: tuple[int, ...]  # empty: no boundaries


def _choose_form(boundary: Tensor | None, query: Tensor) -> tuple[_AttendForm, Tensor]:
    """Return the form of the kernels, and boundaries as a tensor."""
    if boundary is None:
        return _AttendForm(LANES, ()), query.new_empty(0)
    return _AttendForm(LANES, (0,)), boundary


@part(**OPTIONS)
def _weigh_entries(lanes, floor, num_entries, shares):
    """Turn the scores of a position into its weights; nothing has a score of 0.

    ``floor`` is ln of the smallest number; what is below has no weight.
    """
    W = len(lanes)
    tops = zeros(shares, lanes)
    for e in range(0, num_entries, W):
        tops = larger(tops, load(shares, e, lanes))
    top = largest(tops)
    sums = zeros(shares, lanes)
    for e in range(0, num_entries, W):
        score = plus(load(shares, e, lanes), -top)
        none = zeros(shares, lanes)
        power = where_negative(plus(score, -floor), none, exponential(score))
        store(shares, e, power)
        sums = plus(sums, power)
    power_sum = total(sums) + math.exp(-top)
    for e in range(0, num_entries, W):
        store(shares, e, times(load(shares, e, lanes), 1 / power_sum))


@kernel(**OPTIONS)
def _read_rows(
    first, last, form, num_tokens, num_columns, num_places, num_heads, width,
    rows, matched, query, keys, values, offset_bias, place_bias, match_bias, boundary, floor,
    context, weights,
):  # fmt: skip
    """Score every entry against reading nothing, which has a score of 0; mix the values.

    Most positions read the same columns as the one before: up to W of them, a run, are taken
    through each product at once, so that a key or value is loaded once for all of them.
    """
    lanes, W, E, O = form.lanes, len(form.lanes), num_places * NUM_OFFSETS, NUM_OFFSETS
    padded = (width + W - 1) // W * W
    numbers = np.empty(2 * E + O, rows.dtype)
    key_rows, is_mixed, seconds = pointer(numbers, 0), pointer(numbers, E), pointer(numbers, 2 * E)
    scratch = np.zeros(2 * O * (padded + W + 1) + W * (width + padded), query.dtype)
    gathered, scores = pointer(scratch, 0), pointer(scratch, 2 * O * padded)
    across = at(scores, 2 * O * W)
    mixed = at(across, W * width)
    levels = at(mixed, W * padded)
    crossed = at(levels, O)
    stride = num_heads * width
    row = first
    while row < last:
        start = row // num_tokens * num_columns
        most = min(W, last - row, num_tokens - row % num_tokens)
        count = find_run(most, pointer(rows, row * E), E, key_rows, is_mixed)
        for head in range(num_heads):
            at_head = row * num_heads + head
            turn_rows(lanes, pointer(query, at_head * width), stride, count, width, across)
            of_match = pointer(match_bias, head * (MOST_MATCHED + 1))
            for place in range(num_places):
                if not has_entries(at(key_rows, place * O)):
                    for i in range(count):
                        shares = pointer(weights, (at_head + i * num_heads) * E + place * O)
                        for e in range(O):
                            shares[e] = -math.inf
                    continue
                num_keys = gather_keys(
                    lanes, pointer(keys, (2 * start * num_heads + head) * width), stride, width,
                    at(key_rows, place * O), at(is_mixed, place * O), padded, gathered, seconds,
                )  # fmt: skip
                multiply(
                    lanes, gathered, padded, 1, across, W, W, scores, W, num_keys, W, width, False
                )  # fmt: skip
                if len(form.bounds):
                    sum_boundaries(
                        at(key_rows, place * O),
                        pointer(values, (start * num_heads + head) * width), stride, width,
                        pointer(boundary, head * (2 * width + 1)), levels, crossed,
                    )  # fmt: skip
                for i in range(count):
                    entries = pointer(rows, (row + i) * E + place * O)
                    lengths = pointer(matched, (row + i) * E + place * O)
                    shares = pointer(weights, (at_head + i * num_heads) * E + place * O)
                    of_offset = pointer(offset_bias, (at_head + i * num_heads) * O)
                    of_place = place_bias[(at_head + i * num_heads) * num_places + place]
                    for n in range(num_keys - O):
                        if entries[seconds[n]] & 1 == 0:
                            scores[seconds[n] * W + i] = scores[(O + n) * W + i]
                    for e in range(O):
                        bias = of_offset[e] + (of_place + of_match[lengths[e]])
                        if len(form.bounds):
                            bias += crossed[e]
                        shares[e] = scores[e * W + i] + bias if entries[e] >= 0 else -math.inf
            for i in range(count):
                shares = pointer(weights, (at_head + i * num_heads) * E)
                _weigh_entries(lanes, floor[0], E, shares)
            for j in range(0, count * padded, W):
                store(mixed, j, zeros(mixed, lanes))
            for place in range(num_places):
                if not has_entries(at(key_rows, place * O)):
                    continue
                gather_values(
                    lanes, pointer(values, (start * num_heads + head) * width), stride, width,
                    at(key_rows, place * O), padded, gathered,
                )  # fmt: skip
                multiply(
                    lanes, pointer(weights, at_head * E + place * O), num_heads * E, 1,
                    gathered, W, padded, mixed, padded, count, padded, O, True,
                )  # fmt: skip
            for i in range(count):
                target = pointer(context, (at_head + i * num_heads) * width)
                copy_numbers(lanes, at(mixed, i * padded), width, target)
        row += count
    keep(numbers)
    keep(scratch)


@part(**OPTIONS)
def _find_slopes(lanes, num_entries, shares, slopes):
    """Turn the gradients of a position's weights into those of its scores, in place."""
    W = len(lanes)
    products = zeros(slopes, lanes)
    for e in range(0, num_entries, W):
        products = plus(products, times(load(slopes, e, lanes), load(shares, e, lanes)))
    mean = total(products)
    for e in range(0, num_entries, W):
        slope = times(load(shares, e, lanes), plus(load(slopes, e, lanes), -mean))
        store(slopes, e, slope)


@part(**OPTIONS)
def _sum_slopes(lanes, num_places, slopes, lengths, of_offset, of_place, of_match):
    """Set the gradients of a position's biases; add to those of ``match_bias``, [4, 17].

    Neighbours are added to different ones of the four rows, as most lengths are equal and each
    sum would wait for the one before.
    """
    W, O = len(lanes), NUM_OFFSETS
    for place in range(num_places):
        sums = zeros(slopes, lanes)
        for j in range(0, O, W):
            slope = load(slopes, place * O + j, lanes)
            sums = plus(sums, slope)
            store(of_offset, j, plus(load(of_offset, j, lanes), slope) if place else slope)
        of_place[place] = total(sums)
    for e in range(0, num_places * O, 4):
        for k in range(4):
            of_match[k * (MOST_MATCHED + 1) + lengths[e + k]] += slopes[e + k]


@kernel(**OPTIONS)
def _backward_rows(
    first, last, form, num_tokens, num_columns, num_places, num_heads, width,
    rows, matched, query, keys, values, boundary, weights, dcontext, dweights,
    dquery, dkeys, dvalues, doffset, dplace, dmatch, dboundary,
):  # fmt: skip
    """Set the gradients of one head of a stream each; those of ``match_bias`` by stream."""
    lanes, W, E, O = form.lanes, len(form.lanes), num_places * NUM_OFFSETS, NUM_OFFSETS
    padded = (width + W - 1) // W * W
    numbers = np.empty(2 * E + O, rows.dtype)
    key_rows, is_mixed, seconds = pointer(numbers, 0), pointer(numbers, E), pointer(numbers, 2 * E)
    size = 4 * O * padded + W * (O + width + 3 * padded + E + O) + 4 * (MOST_MATCHED + 1) + 3 * O
    scratch = np.zeros(size, query.dtype)
    gathered, grads = pointer(scratch, 0), pointer(scratch, 2 * O * padded)
    products, across = pointer(scratch, 4 * O * padded), pointer(scratch, 4 * O * padded + O * W)
    queries = at(across, W * width)
    outer = at(queries, W * padded)
    dqueries = at(outer, W * padded)
    slopes = at(dqueries, W * padded)
    past = at(slopes, W * E)
    by_length = at(past, W * O)
    levels = at(by_length, 4 * (MOST_MATCHED + 1))
    crossed, dcrossed = at(levels, O), at(levels, 2 * O)
    B = 2 * width + 1
    stride = num_heads * width
    for stream_head in range(first, last):
        batch, head = stream_head // num_heads, stream_head % num_heads
        of_keys = 2 * batch * num_columns * stride + head * width
        of_values = batch * num_columns * stride + head * width
        for n in range(4 * (MOST_MATCHED + 1)):
            by_length[n] = 0
        if len(form.bounds):
            dboundary[stream_head * B : (stream_head + 1) * B] = 0
        row, end = batch * num_tokens, (batch + 1) * num_tokens
        while row < end:
            count = find_run(min(W, end - row), pointer(rows, row * E), E, key_rows, is_mixed)
            at_head = row * num_heads + head
            shares = pointer(weights, at_head * E)
            turn_rows(lanes, pointer(dcontext, at_head * width), stride, count, width, across)
            for i in range(count):
                at_row = (at_head + i * num_heads) * width
                copy_numbers(lanes, pointer(query, at_row), width, at(queries, i * padded))
                copy_numbers(lanes, pointer(dcontext, at_row), width, at(outer, i * padded))
                for j in range(0, padded, W):
                    store(dqueries, i * padded + j, zeros(dqueries, lanes))
            for place in range(num_places):
                if not has_entries(at(key_rows, place * O)):
                    for i in range(count):
                        for j in range(0, O, W):
                            store(slopes, i * E + place * O + j, zeros(slopes, lanes))
                    continue
                gather_values(
                    lanes, pointer(values, of_values), stride, width,
                    at(key_rows, place * O), padded, gathered,
                )  # fmt: skip
                multiply(
                    lanes, gathered, padded, 1, across, W, W, products, W, O, W, width, False
                )  # fmt: skip
                for i in range(count):
                    dshares = pointer(dweights, (at_head + i * num_heads) * E + place * O)
                    target = at(slopes, i * E + place * O)
                    for e in range(O):
                        target[e] = products[e * W + i] + dshares[e]
                multiply(
                    lanes, at(shares, place * O), 1, num_heads * E, outer, W, padded,
                    grads, padded, O, padded, count, False,
                )  # fmt: skip
                for e in range(O):
                    entry = key_rows[place * O + e]
                    if entry >= 0:
                        target = pointer(dvalues, of_values + (entry >> 1) * stride)
                        add_multiple(lanes, at(grads, e * padded), 1.0, width, target)
            for i in range(count):
                at_row = at_head + i * num_heads
                _find_slopes(lanes, E, at(shares, i * num_heads * E), at(slopes, i * E))
                _sum_slopes(
                    lanes, num_places, at(slopes, i * E), pointer(matched, (row + i) * E),
                    pointer(doffset, at_row * O), pointer(dplace, at_row * num_places), by_length,
                )  # fmt: skip
            for place in range(num_places):
                if not has_entries(at(key_rows, place * O)):
                    continue
                if len(form.bounds):
                    for e in range(O):
                        dcrossed[e] = 0
                        for i in range(count):
                            dcrossed[e] += slopes[i * E + place * O + e]
                    around, of_head = at(key_rows, place * O), pointer(boundary, head * B)
                    read = pointer(values, of_values)
                    sum_boundaries(around, read, stride, width, of_head, levels, crossed)
                    add_boundary_gradients(
                        around, read, stride, width, of_head, levels, dcrossed,
                        pointer(dvalues, of_values), pointer(dboundary, stream_head * B),
                    )  # fmt: skip
                num_keys = gather_keys(
                    lanes, pointer(keys, of_keys), stride, width,
                    at(key_rows, place * O), at(is_mixed, place * O), padded, gathered, seconds,
                )  # fmt: skip
                num_seconds, of_place = num_keys - O, at(slopes, place * O)
                for n in range(num_seconds):
                    for i in range(count):
                        entry, e = rows[(row + i) * E + place * O + seconds[n]], i * E + seconds[n]
                        past[i * O + n] = 0
                        if entry & 1 == 0:
                            past[i * O + n], of_place[e] = of_place[e], 0
                multiply(
                    lanes, of_place, E, 1, gathered, W, padded,
                    dqueries, padded, count, padded, O, True,
                )  # fmt: skip
                multiply(
                    lanes, of_place, 1, E, queries, W, padded,
                    grads, padded, O, padded, count, False,
                )  # fmt: skip
                second_grads = at(grads, O * padded)
                if num_seconds:
                    multiply(
                        lanes, past, O, 1, at(gathered, O * padded), W, padded,
                        dqueries, padded, count, padded, num_seconds, True,
                    )  # fmt: skip
                    multiply(
                        lanes, past, 1, O, queries, W, padded,
                        second_grads, padded, num_seconds, padded, count, False,
                    )  # fmt: skip
                for e in range(O):
                    entry = key_rows[place * O + e]
                    if entry >= 0:
                        target = pointer(dkeys, of_keys + entry * stride)
                        add_multiple(lanes, at(grads, e * padded), 1.0, width, target)
                for n in range(num_seconds):
                    entry = key_rows[place * O + seconds[n]] - 1
                    target = pointer(dkeys, of_keys + entry * stride)
                    add_multiple(lanes, at(second_grads, n * padded), 1.0, width, target)
            for i in range(count):
                target = pointer(dquery, (at_head + i * num_heads) * width)
                copy_numbers(lanes, at(dqueries, i * padded), width, target)
            row += count
        for length in range(MOST_MATCHED + 1):
            summed = by_length[length]
            for k in range(1, 4):
                summed += by_length[k * (MOST_MATCHED + 1) + length]
            dmatch[stream_head * (MOST_MATCHED + 1) + length] = summed
    keep(numbers)
    keep(scratch)


def _run_forward(
    rows: Tensor, matched: Tensor, query: Tensor, keys: Tensor, values: Tensor,
    offset_bias: Tensor, place_bias: Tensor, match_bias: Tensor, boundary: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, num_tokens, num_heads, width = query.shape
    context, weights = _list_results(rows, matched, query)
    sizes = (num_tokens, values.shape[1], place_bias.shape[-1], num_heads, width)
    floor = query.new_tensor([math.log(torch.finfo(query.dtype).tiny)])
    form, boundary = _choose_form(boundary, query)
    biases = (offset_bias, place_bias, match_bias, boundary, floor)
    inputs = (rows, matched, query, keys, values, *biases)
    work = num_heads * rows.shape[2] * (2 * width + 20)
    run_rows(_read_rows, form, batch * num_tokens, work, *sizes, *inputs, context, weights)
    return context, weights


def _list_results(
    rows: Tensor, matched: Tensor, query: Tensor, *_: Tensor
) -> tuple[Tensor, Tensor]:
    weights = query.new_empty(*query.shape[:3], rows.shape[2])
    return query.new_empty(query.shape), weights


def _run_backward(
    rows: Tensor, matched: Tensor, query: Tensor, keys: Tensor, values: Tensor,
    place_bias: Tensor, boundary: Tensor | None, weights: Tensor,
    dcontext: Tensor, dweights: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    batch, num_tokens, num_heads, width = query.shape
    sizes = (num_tokens, values.shape[1], place_bias.shape[-1], num_heads, width)
    places = (rows, matched, query, keys, values, place_bias, boundary)
    dquery, dkeys, dvalues, *dbiases, dmatch, dboundary = _list_gradients(*places)
    form, boundary = _choose_form(boundary, query)
    inputs = (rows, matched, query, keys, values, boundary, weights, dcontext, dweights)
    by_stream = (dmatch.new_empty(batch, *part.shape) for part in (dmatch, dboundary))
    dmatch, dboundary = by_stream
    grads = (dquery, dkeys.zero_(), dvalues.zero_(), *dbiases, dmatch, dboundary)
    work = num_tokens * rows.shape[2] * (4 * width + 20)
    run_rows(_backward_rows, form, batch * num_heads, work, *sizes, *inputs, *grads)
    doffset, dplace = dbiases
    return dquery, dkeys, dvalues, doffset, dplace, dmatch.sum(dim=0), dboundary.sum(dim=0)


def _list_gradients(
    rows: Tensor, matched: Tensor, query: Tensor, keys: Tensor, values: Tensor,
    place_bias: Tensor, boundary: Tensor | None, *_: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    shapes = [query.shape, keys.shape, values.shape, (*query.shape[:3], NUM_OFFSETS)]
    shapes += [place_bias.shape, (query.shape[2], MOST_MATCHED + 1)]
    shapes += [torch.Size([0]) if boundary is None else boundary.shape]
    return tuple(query.new_empty(shape) for shape in shapes)


attend_entries_native = declare_operator(
    "attend_entries",
    _run_forward,
    backward=_run_backward,
    results="context weights",
    gradients="query keys values offset_bias place_bias match_bias boundary",
    shapes=_list_results,
    gradient_shapes=_list_gradients,
)
"""Return context and weights; see ``attend_entries``."""
