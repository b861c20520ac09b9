"""Shares of the heads in the output mixture, compiled: of all entries, or of one token alone."""
# mypy: allow-untyped-defs

import math

import numpy as np
import torch
from torch import Tensor

from unimatrix.ops.numba.compile import kernel, part
from unimatrix.ops.numba.lanes import (
    OPTIONS,
    at,
    keep,
    load,
    plus,
    pointer,
    store,
    total,
    zeros,
)
from unimatrix.ops.numba.products import LANES
from unimatrix.ops.numba.threads import run_rows
from unimatrix.ops.numba.tiles import add_multiple
from unimatrix.ops.operator import declare_operator


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
