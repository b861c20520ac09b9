"""Attention around places, compiled: neighbours that read the same columns read them together."""
# mypy: allow-untyped-defs

import math

import numpy as np
import torch
from torch import Tensor

from unimatrix.ops.indexed_attention.entries import BEFORE, MOST_MATCHED, NUM_OFFSETS, REACH
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
from unimatrix.ops.numba.tiles import TILE, add_multiple, copy_rows, count_spans, sum_spans
from unimatrix.ops.operator import declare_operator


@kernel(**OPTIONS)
def _find_rows(
    first, last, lanes, num_tokens, num_columns, num_places, window,
    text, distances, rows, matched, token_ids,
):  # fmt: skip
    """Set row and token of every entry, -1 and 0 for none, and how many tokens before it match."""
    num_entries = num_places * NUM_OFFSETS
    for row in range(first, last):
        batch, t = row // num_tokens, row % num_tokens
        start, now = batch * num_columns, num_columns - num_tokens + t
        for e in range(num_entries):
            entry = row * num_entries + e
            distance = distances[row * num_places + e // NUM_OFFSETS]
            rows[entry], matched[entry], token_ids[entry] = -1, 0, 0
            if distance < 0:
                continue
            column = now - distance + e % NUM_OFFSETS - BEFORE
            if column < 0 or column > now or now - column >= window - MOST_MATCHED:
                continue
            if text[start + column] < 0:
                continue
            token_ids[entry] = text[start + column]
            rows[entry] = 2 * column + (1 if column + REACH - 1 <= now else 0)
            length = 0
            while (
                length < MOST_MATCHED
                and length < column
                and text[start + column - 1 - length] == text[start + now - length]
            ):
                length += 1
            matched[entry] = length


@kernel(**OPTIONS)
def _sum_rows_around(first, last, lanes, num_columns, width, features, taps, rows, sums):
    """Set the wanted sums; ``taps`` [24, D] are of the tokens from the twelfth before on."""
    whole_lanes = width - width % len(lanes)
    for n in range(first, last):
        token, sees_ahead = rows[n] // 2, rows[n] % 2
        column = token % num_columns
        start = max(0, REACH - column)
        end = min(REACH + REACH * sees_ahead, num_columns - column + REACH)
        target = pointer(sums, n * width)
        for j in range(0, whole_lanes, len(lanes)):
            summed = zeros(target, lanes)
            for t in range(start, end):
                feature = load(pointer(features, (token - REACH + t) * width), j, lanes)
                summed = plus(summed, times(feature, load(pointer(taps, t * width), j, lanes)))
            store(target, j, summed)
        for j in range(whole_lanes, width):
            target[j] = 0
            for t in range(start, end):
                target[j] += features[(token - REACH + t) * width + j] * taps[t * width + j]


@part(**OPTIONS)
def _add_products(lanes, row, factors, width, target):
    """Add the products of two rows of any width to ``target``."""
    whole_lanes = width - width % len(lanes)
    for j in range(0, whole_lanes, len(lanes)):
        product = times(load(row, j, lanes), load(factors, j, lanes))
        store(target, j, plus(load(target, j, lanes), product))
    for j in range(whole_lanes, width):
        target[j] += row[j] * factors[j]


@kernel(**OPTIONS)
def _sum_around_backward_spans(
    first, last, lanes, num_spans, num_columns, width,
    features, taps, places, dsums, dfeatures, grads,
):  # fmt: skip
    """Set the gradients of spans of tokens; those of the taps by span.

    ``places`` [2 B S] are those of the sums among the wanted ones, -1 for the others.
    """
    num_tokens, num_taps = len(features) // width, 2 * REACH
    for span in range(first, last):
        grads[span * num_taps * width : (span + 1) * num_taps * width] = 0
        for token in range(span * num_tokens // num_spans, (span + 1) * num_tokens // num_spans):
            column = token % num_columns
            source, target = pointer(features, token * width), pointer(dfeatures, token * width)
            for j in range(width):
                target[j] = 0
            for t in range(max(0, column + REACH - num_columns + 1), num_taps):
                if column + REACH - t < 0:
                    break
                tap = pointer(taps, t * width)
                dtap = pointer(grads, (span * num_taps + t) * width)
                # Sums of the tokens before are made with the first half of the taps alone.
                for form in range(0 if t < REACH else 1, 2):
                    place = places[2 * (token + REACH - t) + form]
                    if place >= 0:
                        grad = pointer(dsums, place * width)
                        _add_products(lanes, tap, grad, width, target)
                        _add_products(lanes, source, grad, width, dtap)


def _sum_around(features: Tensor, kernels: Tensor, rows: Tensor) -> Tensor:
    sums = _list_sums(features, kernels, rows)
    num_columns, width = features.shape[1:]
    inputs = (features, kernels.transpose(1, 2), rows)
    work = 2 * REACH * width
    run_rows(_sum_rows_around, LANES, len(rows), work, num_columns, width, *inputs, sums)
    return sums


def _list_sums(features: Tensor, kernels: Tensor, rows: Tensor) -> Tensor:
    return features.new_empty(rows.shape[0], features.shape[-1])


def _sum_around_backward(
    features: Tensor, kernels: Tensor, rows: Tensor, dsums: Tensor
) -> tuple[Tensor, Tensor]:
    num_columns, width = features.shape[1:]
    num_tokens = features.numel() // width
    places = rows.new_full((2 * num_tokens,), -1)
    places[rows] = torch.arange(len(rows))
    num_spans = count_spans(-(-num_tokens // TILE))
    dfeatures = features.new_empty(features.shape)
    grads = features.new_empty(num_spans, 2, REACH, width)
    sizes = (num_spans, num_columns, width)
    inputs = (features, kernels.transpose(1, 2), places, dsums)
    work = 4 * REACH * width * num_tokens // num_spans
    run_rows(_sum_around_backward_spans, LANES, num_spans, work, *sizes, *inputs, dfeatures, grads)
    return dfeatures, sum_spans(grads).transpose(1, 2).contiguous()


def _list_sum_gradients(features: Tensor, kernels: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    return features.new_empty(features.shape), kernels.new_empty(kernels.shape)


sum_around_native = declare_operator(
    "sum_around",
    _sum_around,
    backward=_sum_around_backward,
    gradients="features kernels",
    shapes=_list_sums,
    gradient_shapes=_list_sum_gradients,
)
"""Return the wanted sums; see ``sum_around``."""


@part(**OPTIONS)
def _find_run(most, rows, num_entries, key_rows, is_mixed):
    """Return how many positions from the first on read the same columns of one stream.

    Args:
        most: positions to look at.
        rows: of the entries of the first position, and behind them those of the next.
        num_entries: E.
        key_rows: [E], set to the last of each entry's rows, -1 where no position has it.
        is_mixed: [E], set to 1 where other positions read the row before it, the past-only key.
    """
    for e in range(num_entries):
        key_rows[e], is_mixed[e] = rows[e], 0
    for count in range(1, most):
        entries = at(rows, count * num_entries)
        num_others = 0
        for e in range(num_entries):
            num_others += entries[e] != key_rows[e]
        if num_others == 0:
            continue
        num_others = 0
        for e in range(num_entries):
            is_other = entries[e] >> 1 != key_rows[e] >> 1
            num_others += is_other and entries[e] >= 0 and key_rows[e] >= 0
        if num_others:
            return count
        for e in range(num_entries):
            if entries[e] != key_rows[e] and entries[e] >= 0:
                is_mixed[e] |= key_rows[e] >= 0
                key_rows[e] = max(key_rows[e], entries[e])
    return most


@part(**OPTIONS)
def _copy_numbers(lanes, source, width, target):
    """Copy a row of any width."""
    whole_lanes = width - width % len(lanes)
    copy_rows(lanes, source, target, whole_lanes)
    for j in range(whole_lanes, width):
        target[j] = source[j]


@part(**OPTIONS)
def _turn_rows(lanes, source, stride, count, width, target):
    """Set ``target`` [width, W] to ``count`` rows as columns, zeros behind them."""
    for j in range(width):
        store(target, j * len(lanes), zeros(target, lanes))
        for i in range(count):
            target[j * len(lanes) + i] = source[i * stride + j]


@part(**OPTIONS)
def _has_entries(key_rows):
    """Return whether a run reads anything around a place."""
    num_entries = 0
    for offset in range(NUM_OFFSETS):
        num_entries += key_rows[offset] >= 0
    return num_entries > 0


@part(**OPTIONS)
def _gather_keys(lanes, keys, stride, width, key_rows, is_mixed, padded, gathered, seconds):
    """Copy the keys around a place; return their number.

    Args:
        keys: of one head and stream, ``stride`` numbers apart.
        key_rows, is_mixed: from ``_find_run``, of the place.
        gathered: [2 * 80, padded]; the key of each entry, zeros for none, and then the past-only
            keys of those that have both.
        seconds: [80], set to the entries of these.
    """
    for offset in range(NUM_OFFSETS):
        target = at(gathered, offset * padded)
        if key_rows[offset] >= 0:
            _copy_numbers(lanes, at(keys, key_rows[offset] * stride), width, target)
        else:
            for j in range(0, padded, len(lanes)):
                store(target, j, zeros(target, lanes))
    num_keys = NUM_OFFSETS
    for offset in range(NUM_OFFSETS):
        if is_mixed[offset]:
            source = at(keys, (key_rows[offset] - 1) * stride)
            _copy_numbers(lanes, source, width, at(gathered, num_keys * padded))
            seconds[num_keys - NUM_OFFSETS] = offset
            num_keys += 1
    return num_keys


@part(**OPTIONS)
def _gather_values(lanes, values, stride, width, key_rows, padded, gathered):
    """Copy the values around a place, zeros for no entry; arguments as of ``_gather_keys``."""
    for offset in range(NUM_OFFSETS):
        target = at(gathered, offset * padded)
        if key_rows[offset] >= 0:
            _copy_numbers(lanes, at(values, (key_rows[offset] >> 1) * stride), width, target)
        else:
            for j in range(0, padded, len(lanes)):
                store(target, j, zeros(target, lanes))


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
    first, last, lanes, num_tokens, num_columns, num_places, num_heads, width,
    rows, matched, query, keys, values, offset_bias, place_bias, match_bias, floor,
    context, weights,
):  # fmt: skip
    """Score every entry against reading nothing, which has a score of 0; mix the values.

    Most positions read the same columns as the one before: up to W of them, a run, are taken
    through each product at once, so that a key or value is loaded once for all of them.
    """
    W, E, O = len(lanes), num_places * NUM_OFFSETS, NUM_OFFSETS
    padded = (width + W - 1) // W * W
    numbers = np.empty(2 * E + O, rows.dtype)
    key_rows, is_mixed, seconds = pointer(numbers, 0), pointer(numbers, E), pointer(numbers, 2 * E)
    scratch = np.zeros(2 * O * (padded + W) + W * (width + padded), query.dtype)
    gathered, scores = pointer(scratch, 0), pointer(scratch, 2 * O * padded)
    across = at(scores, 2 * O * W)
    mixed = at(across, W * width)
    stride = num_heads * width
    row = first
    while row < last:
        start = row // num_tokens * num_columns
        most = min(W, last - row, num_tokens - row % num_tokens)
        count = _find_run(most, pointer(rows, row * E), E, key_rows, is_mixed)
        for head in range(num_heads):
            at_head = row * num_heads + head
            _turn_rows(lanes, pointer(query, at_head * width), stride, count, width, across)
            of_match = pointer(match_bias, head * (MOST_MATCHED + 1))
            for place in range(num_places):
                if not _has_entries(at(key_rows, place * O)):
                    for i in range(count):
                        shares = pointer(weights, (at_head + i * num_heads) * E + place * O)
                        for e in range(O):
                            shares[e] = -math.inf
                    continue
                num_keys = _gather_keys(
                    lanes, pointer(keys, (2 * start * num_heads + head) * width), stride, width,
                    at(key_rows, place * O), at(is_mixed, place * O), padded, gathered, seconds,
                )  # fmt: skip
                multiply(
                    lanes, gathered, padded, 1, across, W, W, scores, W, num_keys, W, width, False
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
                        shares[e] = scores[e * W + i] + bias if entries[e] >= 0 else -math.inf
            for i in range(count):
                shares = pointer(weights, (at_head + i * num_heads) * E)
                _weigh_entries(lanes, floor[0], E, shares)
            for j in range(0, count * padded, W):
                store(mixed, j, zeros(mixed, lanes))
            for place in range(num_places):
                if not _has_entries(at(key_rows, place * O)):
                    continue
                _gather_values(
                    lanes, pointer(values, (start * num_heads + head) * width), stride, width,
                    at(key_rows, place * O), padded, gathered,
                )  # fmt: skip
                multiply(
                    lanes, pointer(weights, at_head * E + place * O), num_heads * E, 1,
                    gathered, W, padded, mixed, padded, count, padded, O, True,
                )  # fmt: skip
            for i in range(count):
                target = pointer(context, (at_head + i * num_heads) * width)
                _copy_numbers(lanes, at(mixed, i * padded), width, target)
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
    first, last, lanes, num_tokens, num_columns, num_places, num_heads, width,
    rows, matched, query, keys, values, weights, dcontext, dweights,
    dquery, dkeys, dvalues, doffset, dplace, dmatch,
):  # fmt: skip
    """Set the gradients of one head of a stream each; those of ``match_bias`` by stream."""
    W, E, O = len(lanes), num_places * NUM_OFFSETS, NUM_OFFSETS
    padded = (width + W - 1) // W * W
    numbers = np.empty(2 * E + O, rows.dtype)
    key_rows, is_mixed, seconds = pointer(numbers, 0), pointer(numbers, E), pointer(numbers, 2 * E)
    size = 4 * O * padded + W * (O + width + 3 * padded + E + O) + 4 * (MOST_MATCHED + 1)
    scratch = np.zeros(size, query.dtype)
    gathered, grads = pointer(scratch, 0), pointer(scratch, 2 * O * padded)
    products, across = pointer(scratch, 4 * O * padded), pointer(scratch, 4 * O * padded + O * W)
    queries = at(across, W * width)
    outer = at(queries, W * padded)
    dqueries = at(outer, W * padded)
    slopes = at(dqueries, W * padded)
    past = at(slopes, W * E)
    by_length = at(past, W * O)
    stride = num_heads * width
    for stream_head in range(first, last):
        batch, head = stream_head // num_heads, stream_head % num_heads
        of_keys = 2 * batch * num_columns * stride + head * width
        of_values = batch * num_columns * stride + head * width
        for n in range(4 * (MOST_MATCHED + 1)):
            by_length[n] = 0
        row, end = batch * num_tokens, (batch + 1) * num_tokens
        while row < end:
            count = _find_run(min(W, end - row), pointer(rows, row * E), E, key_rows, is_mixed)
            at_head = row * num_heads + head
            shares = pointer(weights, at_head * E)
            _turn_rows(lanes, pointer(dcontext, at_head * width), stride, count, width, across)
            for i in range(count):
                at_row = (at_head + i * num_heads) * width
                _copy_numbers(lanes, pointer(query, at_row), width, at(queries, i * padded))
                _copy_numbers(lanes, pointer(dcontext, at_row), width, at(outer, i * padded))
                for j in range(0, padded, W):
                    store(dqueries, i * padded + j, zeros(dqueries, lanes))
            for place in range(num_places):
                if not _has_entries(at(key_rows, place * O)):
                    for i in range(count):
                        for j in range(0, O, W):
                            store(slopes, i * E + place * O + j, zeros(slopes, lanes))
                    continue
                _gather_values(
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
                if not _has_entries(at(key_rows, place * O)):
                    continue
                num_keys = _gather_keys(
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
                _copy_numbers(lanes, at(dqueries, i * padded), width, target)
            row += count
        for length in range(MOST_MATCHED + 1):
            summed = by_length[length]
            for k in range(1, 4):
                summed += by_length[k * (MOST_MATCHED + 1) + length]
            dmatch[stream_head * (MOST_MATCHED + 1) + length] = summed
    keep(numbers)
    keep(scratch)


def _find_entries(text: Tensor, distances: Tensor, window: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, num_tokens, num_places = distances.shape
    found = _list_found(text, distances, window)
    sizes = (num_tokens, text.shape[1], num_places, window)
    work = 4 * num_places * NUM_OFFSETS
    run_rows(_find_rows, LANES, batch * num_tokens, work, *sizes, text, distances, *found)
    return found


def _list_found(text: Tensor, distances: Tensor, window: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, num_tokens, num_places = distances.shape
    rows = distances.new_empty(batch, num_tokens, num_places * NUM_OFFSETS)
    return rows, rows.new_empty(rows.shape), text.new_empty(rows.shape)


find_entries_native = declare_operator("find_entries", _find_entries, shapes=_list_found)
"""Return the fields of ``Entries``; see ``find_entries``."""


def _run_forward(
    rows: Tensor, matched: Tensor, query: Tensor, keys: Tensor, values: Tensor,
    offset_bias: Tensor, place_bias: Tensor, match_bias: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, num_tokens, num_heads, width = query.shape
    context, weights = _list_results(rows, matched, query)
    sizes = (num_tokens, values.shape[1], place_bias.shape[-1], num_heads, width)
    floor = query.new_tensor([math.log(torch.finfo(query.dtype).tiny)])
    inputs = (rows, matched, query, keys, values, offset_bias, place_bias, match_bias, floor)
    work = num_heads * rows.shape[2] * (2 * width + 20)
    run_rows(_read_rows, LANES, batch * num_tokens, work, *sizes, *inputs, context, weights)
    return context, weights


def _list_results(
    rows: Tensor, matched: Tensor, query: Tensor, *_: Tensor
) -> tuple[Tensor, Tensor]:
    weights = query.new_empty(*query.shape[:3], rows.shape[2])
    return query.new_empty(query.shape), weights


def _run_backward(
    rows: Tensor, matched: Tensor, query: Tensor, keys: Tensor, values: Tensor,
    place_bias: Tensor, weights: Tensor, dcontext: Tensor, dweights: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    batch, num_tokens, num_heads, width = query.shape
    sizes = (num_tokens, values.shape[1], place_bias.shape[-1], num_heads, width)
    inputs = (rows, matched, query, keys, values, weights, dcontext, dweights)
    dquery, dkeys, dvalues, *dbiases, dmatch = _list_gradients(*inputs[:5], place_bias)
    by_stream = dmatch.new_empty(batch, *dmatch.shape)
    grads = (dquery, dkeys.zero_(), dvalues.zero_(), *dbiases, by_stream)
    work = num_tokens * rows.shape[2] * (4 * width + 20)
    run_rows(_backward_rows, LANES, batch * num_heads, work, *sizes, *inputs, *grads)
    doffset, dplace = dbiases
    return dquery, dkeys, dvalues, doffset, dplace, by_stream.sum(dim=0)


def _list_gradients(
    rows: Tensor, matched: Tensor, query: Tensor, keys: Tensor, values: Tensor,
    place_bias: Tensor, *_: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    shapes = [query.shape, keys.shape, values.shape, (*query.shape[:3], NUM_OFFSETS)]
    shapes += [place_bias.shape, (query.shape[2], MOST_MATCHED + 1)]
    return tuple(query.new_empty(shape) for shape in shapes)


attend_entries_native = declare_operator(
    "attend_entries",
    _run_forward,
    backward=_run_backward,
    results="context weights",
    gradients="query keys values offset_bias place_bias match_bias",
    shapes=_list_results,
    gradient_shapes=_list_gradients,
)
"""Return context and weights; see ``attend_entries``."""


@kernel(**OPTIONS)
def _share_rows(
    first, last, lanes, num_others, num_heads, num_entries,
    least, scores, head_scores, weights, shares, log_others, powers,
):  # fmt: skip
    """Set the shares of entries, at least ``least``; ln of the others'; the power of each head."""
    width = num_others + num_entries
    for row in range(first, last):
        best = 0.0
        for k in range(num_others):
            best = max(best, scores[row * num_others + k])
        for h in range(num_heads):
            best = max(best, head_scores[row * num_heads + h])
        total = 0.0
        for k in range(num_others):
            total += math.exp(scores[row * num_others + k] - best)
        of_entries = pointer(shares, row * width + num_others)
        for e in range(num_entries):
            of_entries[e] = 0
        for h in range(num_heads):
            at = row * num_heads + h
            power = math.exp(head_scores[at] - best)
            powers[at] = power
            of_head = pointer(weights, at * num_entries)
            add_multiple(lanes, of_head, power, num_entries, of_entries)
        for e in range(num_entries):
            total += of_entries[e]
        log_sum = best + math.log(total)
        for h in range(num_heads):
            powers[row * num_heads + h] /= total
        for e in range(num_entries):
            of_entries[e] = max(of_entries[e] / total, least[0])
        for k in range(num_others):
            shares[row * width + k] = 1
            log_others[row * num_others + k] = scores[row * num_others + k] - log_sum


@kernel(**OPTIONS)
def _share_backward_rows(
    first, last, lanes, num_others, num_heads, num_entries,
    weights, powers, log_shares, dshares, dscores, dheads, dweights,
):  # fmt: skip
    width = num_others + num_entries
    slopes = np.empty(num_entries, weights.dtype)
    for row in range(first, last):
        total = 0.0
        for i in range(width):
            total += dshares[row * width + i]
        for k in range(num_others):
            at = row * width + k
            dscores[row * num_others + k] = dshares[at] - total * math.exp(log_shares[at])
        for e in range(num_entries):
            # Most entries are another token than the target, and only their sum matters.
            slope, share = dshares[row * width + num_others + e], 0.0
            if slope != 0:
                for h in range(num_heads):
                    at = row * num_heads + h
                    share += powers[at] * weights[at * num_entries + e]
            # What has no share has no gradient of its own.
            slopes[e] = (slope / share if share > 0 else 0.0) - total
        for h in range(num_heads):
            at = row * num_heads + h
            slope = 0.0
            for e in range(num_entries):
                dweights[at * num_entries + e] = powers[at] * slopes[e]
                slope += slopes[e] * weights[at * num_entries + e]
            dheads[at] = powers[at] * slope


def _share(scores: Tensor, head_scores: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    *_, num_heads, num_entries = weights.shape
    shares, powers = _list_shares(scores, head_scores, weights)
    sizes = (scores.shape[-1], num_heads, num_entries)
    num_rows, work = scores.shape[:-1].numel(), 2 * num_heads * num_entries
    # The logarithm of 0 takes ten times that of a number.
    least = torch.finfo(weights.dtype).tiny
    log_others = torch.empty_like(scores, memory_format=torch.contiguous_format)
    results = (shares, log_others, powers)
    inputs = (weights.new_tensor([least]), scores, head_scores, weights)
    run_rows(_share_rows, LANES, num_rows, work, *sizes, *inputs, *results)
    shares.log_()
    shares.masked_fill_(shares < math.log(2 * least), -torch.inf)
    shares[..., : scores.shape[-1]] = log_others
    return shares, powers


def _list_shares(scores: Tensor, head_scores: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    width = scores.shape[-1] + weights.shape[-1]
    shape = (*scores.shape[:-1], width)
    return scores.new_empty(shape), head_scores.new_empty(head_scores.shape)


def _share_backward(
    scores: Tensor, weights: Tensor, powers: Tensor, shares: Tensor, dshares: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    *_, num_heads, num_entries = weights.shape
    grads = _list_share_gradients(scores, weights, powers)
    sizes = (scores.shape[-1], num_heads, num_entries)
    num_rows, work = scores.shape[:-1].numel(), 4 * num_heads * num_entries
    inputs = (weights, powers, shares, dshares)
    run_rows(_share_backward_rows, LANES, num_rows, work, *sizes, *inputs, *grads)
    return grads


def _list_share_gradients(
    scores: Tensor, weights: Tensor, powers: Tensor, *_: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    like = (scores, powers, weights)
    dscores, dheads, dweights = (tensor.new_empty(tensor.shape) for tensor in like)
    return dscores, dheads, dweights


share_heads_native = declare_operator(
    "share_heads",
    _share,
    backward=_share_backward,
    results="shares",
    saved="powers",
    gradients="scores head_scores weights",
    shapes=_list_shares,
    gradient_shapes=_list_share_gradients,
)
"""Return ln of the shares; see ``share_heads``."""


@part(**OPTIONS)
def _sum_row(lanes, row, count):
    """Return the sum of so many numbers."""
    whole_lanes = count - count % len(lanes)
    sums = zeros(row, lanes)
    for j in range(0, whole_lanes, len(lanes)):
        sums = plus(sums, load(row, j, lanes))
    summed = total(sums)
    for j in range(whole_lanes, count):
        summed += row[j]
    return summed


@part(**OPTIONS)
def _find_target(ids, count, target, places):
    """Set the places of a token among so many; return how many there are."""
    num_found = 0
    for e in range(count):
        places[num_found] = e  # overwritten where it is another: a branch would be guessed wrong
        num_found += ids[e] == target
    return num_found


@kernel(**OPTIONS)
def _score_target_rows(
    first, last, lanes, num_others, num_heads, num_entries,
    scores, head_scores, weights, other_ids, token_ids, targets, log_shares, parts,
):  # fmt: skip
    """Set ln of two shares, and the parts of each row: those of ``_list_target_shares``."""
    K, H, E = num_others, num_heads, num_entries
    places = np.empty(E + 1, token_ids.dtype)
    for row in range(first, last):
        others = pointer(parts, row * (K + 3 * H))
        powers, masses, matched = at(others, K), at(others, K + H), at(others, K + 2 * H)
        best = scores[row * K]
        for k in range(1, K):
            best = max(best, scores[row * K + k])
        for h in range(H):
            best = max(best, head_scores[row * H + h])
        num_found = _find_target(pointer(token_ids, row * E), E, targets[row], pointer(places, 0))
        for h in range(H):
            of_head = pointer(weights, (row * H + h) * E)
            masses[h], matched[h] = _sum_row(lanes, of_head, E), 0
            for n in range(num_found):
                matched[h] += of_head[places[n]]
        power_sum, of_target = 0.0, 0.0
        for k in range(K):
            others[k] = math.exp(scores[row * K + k] - best)
            power_sum += others[k]
            if k and other_ids[row * (K - 1) + k - 1] == targets[row]:
                of_target += others[k]
        for h in range(H):
            powers[h] = math.exp(head_scores[row * H + h] - best)
            power_sum += powers[h] * masses[h]
            of_target += powers[h] * matched[h]
        for i in range(K + H):
            others[i] /= power_sum
        log_sum = best + math.log(power_sum)
        log_shares[2 * row] = scores[row * K] - log_sum
        log_shares[2 * row + 1] = math.log(of_target / power_sum) if of_target > 0 else -math.inf
    keep(places)


@kernel(**OPTIONS)
def _score_target_backward_rows(
    first, last, lanes, num_others, num_heads, num_entries,
    other_ids, token_ids, targets, log_shares, parts, dlog_shares, dscores, dheads, dweights,
):  # fmt: skip
    K, H, E, W = num_others, num_heads, num_entries, len(lanes)
    whole_lanes = E - E % W
    places = np.empty(E + 1, token_ids.dtype)
    for row in range(first, last):
        others = pointer(parts, row * (K + 3 * H))
        powers, masses, matched = at(others, K), at(others, K + H), at(others, K + 2 * H)
        grad_sum, slope = dlog_shares[2 * row], 0.0
        share = math.exp(log_shares[2 * row + 1])
        if share > 0:  # what has no share has no gradient of its own
            grad_sum += dlog_shares[2 * row + 1]
            slope = dlog_shares[2 * row + 1] / share
        for k in range(K):
            gain = -grad_sum
            if k and other_ids[row * (K - 1) + k - 1] == targets[row]:
                gain += slope
            dscores[row * K + k] = others[k] * gain
        dscores[row * K] += dlog_shares[2 * row]
        num_found = _find_target(pointer(token_ids, row * E), E, targets[row], pointer(places, 0))
        for h in range(H):
            dheads[row * H + h] = powers[h] * (slope * matched[h] - grad_sum * masses[h])
            of_entries = pointer(dweights, (row * H + h) * E)
            for e in range(0, whole_lanes, W):
                store(of_entries, e, plus(zeros(of_entries, lanes), -powers[h] * grad_sum))
            for e in range(whole_lanes, E):
                of_entries[e] = -powers[h] * grad_sum
            for n in range(num_found):
                of_entries[places[n]] += powers[h] * slope
    keep(places)


def _share_targets(
    scores: Tensor, head_scores: Tensor, weights: Tensor, other_ids: Tensor, token_ids: Tensor,
    targets: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    *_, num_heads, num_entries = weights.shape
    sizes = (scores.shape[-1], num_heads, num_entries)
    inputs = (scores, head_scores, weights, other_ids, token_ids, targets)
    results = _list_target_shares(*inputs)
    work = 2 * num_heads * num_entries
    run_rows(_score_target_rows, LANES, targets.numel(), work, *sizes, *inputs, *results)
    return results


def _list_target_shares(
    scores: Tensor, head_scores: Tensor, weights: Tensor, *_: Tensor
) -> tuple[Tensor, Tensor]:
    """Return ln of two shares; the shares of other components and of a head's weight of 1, and
    what the weights of each head sum to, in all and of the target."""
    *rows, num_others = scores.shape
    num_parts = num_others + 3 * weights.shape[-2]
    return scores.new_empty(*rows, 2), scores.new_empty(*rows, num_parts)


def _share_targets_backward(
    scores: Tensor, head_scores: Tensor, weights: Tensor, other_ids: Tensor, token_ids: Tensor,
    targets: Tensor, log_shares: Tensor, parts: Tensor, dlog_shares: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    *_, num_heads, num_entries = weights.shape
    grads = _list_share_gradients(scores, weights, head_scores)
    sizes = (scores.shape[-1], num_heads, num_entries)
    inputs = (other_ids, token_ids, targets, log_shares, parts, dlog_shares)
    work = 2 * num_heads * num_entries
    run_rows(_score_target_backward_rows, LANES, targets.numel(), work, *sizes, *inputs, *grads)
    return grads


def _list_target_gradients(
    scores: Tensor, head_scores: Tensor, weights: Tensor, *_: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _list_share_gradients(scores, weights, head_scores)


share_targets_native = declare_operator(
    "share_targets",
    _share_targets,
    backward=_share_targets_backward,
    results="log_shares",
    saved="parts",
    gradients="scores head_scores weights",
    shapes=_list_target_shares,
    gradient_shapes=_list_target_gradients,
)
"""Return ln of the shares; see ``share_targets``."""
