"""Attention around places, compiled: each position visits its entries once forward, once back."""
# mypy: allow-untyped-defs

import math

import numpy as np
import torch
from torch import Tensor

from unimatrix.ops.indexed_attention.entries import BEFORE, MOST_MATCHED, NUM_OFFSETS, REACH
from unimatrix.ops.numba.compile import kernel
from unimatrix.ops.numba.lanes import OPTIONS, pointer
from unimatrix.ops.numba.products import LANES
from unimatrix.ops.numba.threads import run_rows
from unimatrix.ops.numba.tiles import add_multiple, multiply_rows
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
def _read_rows(
    first, last, lanes, num_tokens, num_columns, num_places, num_heads, width,
    rows, matched, query, keys, values, offset_bias, place_bias, match_bias,
    context, weights,
):  # fmt: skip
    """Score every entry against reading nothing, which has a score of 0; mix the values."""
    num_entries = num_places * NUM_OFFSETS
    for row in range(first, last):
        start = row // num_tokens * num_columns
        entries = pointer(rows, row * num_entries)
        lengths = pointer(matched, row * num_entries)
        for head in range(num_heads):
            at_head = row * num_heads + head
            q, target = pointer(query, at_head * width), pointer(context, at_head * width)
            shares = pointer(weights, at_head * num_entries)
            of_offset = pointer(offset_bias, at_head * NUM_OFFSETS)
            of_place = pointer(place_bias, at_head * num_places)
            best = 0.0
            for e in range(num_entries):
                if entries[e] < 0:
                    continue
                key = pointer(keys, ((2 * start + entries[e]) * num_heads + head) * width)
                score = multiply_rows(lanes, q, key, width) + of_offset[e % NUM_OFFSETS]
                score += of_place[e // NUM_OFFSETS]
                score += match_bias[head * (MOST_MATCHED + 1) + lengths[e]]
                shares[e] = score
                best = max(best, score)
            power_sum = math.exp(-best)
            for e in range(num_entries):
                if entries[e] >= 0:
                    shares[e] = math.exp(shares[e] - best)
                    power_sum += shares[e]
                else:
                    shares[e] = 0
            for j in range(width):
                target[j] = 0
            for e in range(num_entries):
                if entries[e] >= 0:
                    shares[e] /= power_sum
                    value = pointer(values, ((start + entries[e] // 2) * num_heads + head) * width)
                    add_multiple(lanes, value, shares[e], width, target)


@kernel(**OPTIONS)
def _backward_rows(
    first, last, lanes, num_tokens, num_columns, num_places, num_heads, width,
    rows, matched, query, keys, values, weights, dcontext, dweights,
    dquery, dkeys, dvalues, doffset, dplace, dmatch,
):  # fmt: skip
    """Set the gradients of whole streams; those of ``match_bias`` by stream."""
    num_entries = num_places * NUM_OFFSETS
    slopes = np.empty(num_entries, weights.dtype)
    for batch in range(first, last):
        start = batch * num_columns
        of_match = pointer(dmatch, batch * num_heads * (MOST_MATCHED + 1))
        for t in range(num_tokens):
            row = batch * num_tokens + t
            entries = pointer(rows, row * num_entries)
            lengths = pointer(matched, row * num_entries)
            for head in range(num_heads):
                at_head = row * num_heads + head
                q, dq = pointer(query, at_head * width), pointer(dquery, at_head * width)
                grad = pointer(dcontext, at_head * width)
                shares = pointer(weights, at_head * num_entries)
                dshares = pointer(dweights, at_head * num_entries)
                of_offset = pointer(doffset, at_head * NUM_OFFSETS)
                of_place = pointer(dplace, at_head * num_places)
                mean = 0.0
                for e in range(num_entries):
                    if entries[e] < 0:
                        continue
                    at_value = ((start + entries[e] // 2) * num_heads + head) * width
                    slope = dshares[e] + multiply_rows(
                        lanes, grad, pointer(values, at_value), width
                    )
                    add_multiple(lanes, grad, shares[e], width, pointer(dvalues, at_value))
                    slopes[e] = slope
                    mean += slope * shares[e]
                for e in range(num_entries):
                    if entries[e] < 0:
                        continue
                    slope = shares[e] * (slopes[e] - mean)
                    at_key = ((2 * start + entries[e]) * num_heads + head) * width
                    add_multiple(lanes, pointer(keys, at_key), slope, width, dq)
                    add_multiple(lanes, q, slope, width, pointer(dkeys, at_key))
                    of_offset[e % NUM_OFFSETS] += slope
                    of_place[e // NUM_OFFSETS] += slope
                    of_match[head * (MOST_MATCHED + 1) + lengths[e]] += slope


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
    inputs = (rows, matched, query, keys, values, offset_bias, place_bias, match_bias)
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
    *grads, dmatch = _list_gradients(*inputs[:5], place_bias)
    by_stream = dmatch.new_zeros(batch, *dmatch.shape)
    for grad in grads:
        grad.zero_()
    work = num_tokens * num_heads * rows.shape[2] * (4 * width + 20)
    run_rows(_backward_rows, LANES, batch, work, *sizes, *inputs, *grads, by_stream)
    dquery, dkeys, dvalues, doffset, dplace = grads
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
