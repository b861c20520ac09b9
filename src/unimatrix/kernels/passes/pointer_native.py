"""Scores and shares of a pointer's components in Numba: one pass forward, one backward."""
# mypy: allow-untyped-defs

import math
from typing import NamedTuple

import torch
from torch import Tensor

from unimatrix.ops.numba.compile import kernel, part
from unimatrix.ops.numba.lanes import OPTIONS, at, pointer
from unimatrix.ops.numba.products import LANES
from unimatrix.ops.numba.threads import run_rows
from unimatrix.ops.numba.tiles import TILE, add_multiple, count_spans, multiply_rows, sum_spans
from unimatrix.ops.operator import declare_operator

_WORK_OF_SHARES = 1000
"""Multiply-adds in the time that a row's exponentials take."""


class FoundInSlots(NamedTuple):
    """What slots found for a pointer, and how it is scored.

    Attributes:
        weight, bias: [Q, D] and [Q], of the scores of h.
        token_ids: [..., Q] int64.
        log_strength: [..., Q], added to the scores; -inf where nothing was found.
        probe: [..., Q] zeros (``ops.hindsight``), which get the gradients of ln of these shares;
            ``None`` where nothing is learned in hindsight.
    """

    weight: Tensor
    bias: Tensor
    token_ids: Tensor
    log_strength: Tensor
    probe: Tensor | None


class FoundMatch(NamedTuple):
    """What an automaton predicts for a pointer, and how it is scored.

    Attributes:
        weight, bias: [1, D] and [1], of the score of h.
        by_length: [L], added for matches of 1, 2, 3-4, 5-8, ... tokens, the last for all longer.
        predicted_ids: [...] int64, -1 where nothing matched.
        match_lengths: [...] int64.
    """

    weight: Tensor
    bias: Tensor
    by_length: Tensor
    predicted_ids: Tensor
    match_lengths: Tensor


class _PointerForm(NamedTuple):
    """Options of the kernels as tuples, since Numba compiles a kernel for their lengths."""

    lanes: tuple[int, ...]
    matched: tuple[int, ...]  # empty: no automaton


@part(**OPTIONS)
def _choose_bucket(length, num_buckets):
    """Return the bucket of a match length: 1, 2, 3-4, 5-8, ..., and the last for all longer."""
    bucket, longest = 0, 1
    while longest < length and bucket < num_buckets - 1:
        bucket, longest = bucket + 1, 2 * longest
    return bucket


@kernel(**OPTIONS)
def _weigh_rows(
    first, last, form, width, num_slots, num_buckets,
    h, weight, bias, log_strength, token_ids, match_weight, match_bias, by_length,
    predicted_ids, match_lengths, all_ids, log_weights,
):  # fmt: skip
    Q = num_slots
    K = Q + len(form.matched)
    for row in range(first, last):
        source, scores = pointer(h, row * width), pointer(log_weights, row * (1 + K))
        ids = pointer(all_ids, row * K)
        scores[0] = 0
        best = scores[0]
        for q in range(Q):
            ids[q] = token_ids[row * Q + q]
            product = multiply_rows(form.lanes, source, pointer(weight, q * width), width)
            scores[1 + q] = product + bias[q] + log_strength[row * Q + q]
            best = max(best, scores[1 + q])
        if len(form.matched):
            ids[Q] = max(predicted_ids[row], 0)
            product = multiply_rows(form.lanes, source, pointer(match_weight, 0), width)
            bucket = _choose_bucket(match_lengths[row], num_buckets)
            scores[1 + Q] = product + match_bias[0] + by_length[bucket]
            if predicted_ids[row] < 0:
                scores[1 + Q] = -math.inf
            best = max(best, scores[1 + Q])
        power_sum = 0.0
        for k in range(1 + K):
            power_sum += math.exp(scores[k] - best)
        log_sum = best + math.log(power_sum)
        for k in range(1 + K):
            scores[k] -= log_sum


@kernel(**OPTIONS)
def _backward_spans(
    first, last, form, num_spans, num_rows, width, num_slots, num_buckets,
    h, weight, match_weight, predicted_ids, match_lengths, log_weights,
    dlog_weights, dh, dlog_strength, dprobe, grads,
):  # fmt: skip
    Q = num_slots
    K = Q + len(form.matched)
    num_grads = len(grads) // num_spans
    for span in range(first, last):
        grads[span * num_grads : (span + 1) * num_grads] = 0
        dweight = pointer(grads, span * num_grads)
        dbias = at(dweight, K * width)
        dby_length = at(dbias, K)
        for row in range(span * num_rows // num_spans, (span + 1) * num_rows // num_spans):
            source, target = pointer(h, row * width), pointer(dh, row * width)
            log_shares = pointer(log_weights, row * (1 + K))
            dlog_shares = pointer(dlog_weights, row * (1 + K))
            grad_sum = dlog_shares[0]
            for k in range(K):
                grad_sum += dlog_shares[1 + k]
            for j in range(width):
                target[j] = 0
            for k in range(K):
                dscore = dlog_shares[1 + k] - math.exp(log_shares[1 + k]) * grad_sum
                weight_row = pointer(weight, k * width)
                if k < Q:
                    dlog_strength[row * Q + k] = dscore
                    dprobe[row * Q + k] = dlog_shares[1 + k]
                else:
                    weight_row = pointer(match_weight, 0)
                    if predicted_ids[row] < 0:
                        continue
                    dby_length[_choose_bucket(match_lengths[row], num_buckets)] += dscore
                dbias[k] += dscore
                add_multiple(form.lanes, weight_row, dscore, width, target)
                add_multiple(form.lanes, source, dscore, width, at(dweight, k * width))


def _run_forward(
    h: Tensor, weight: Tensor, bias: Tensor, log_strength: Tensor, probe: Tensor | None,
    match_weight: Tensor, match_bias: Tensor, by_length: Tensor, token_ids: Tensor,
    predicted_ids: Tensor, match_lengths: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    width, num_slots, num_buckets = h.shape[-1], weight.shape[0], by_length.shape[0]
    form = _PointerForm(LANES, (0,) * match_weight.shape[0])
    num_components = num_slots + len(form.matched)
    all_ids = predicted_ids.new_empty(*h.shape[:-1], num_components, dtype=torch.int64)
    log_weights = h.new_empty(*h.shape[:-1], 1 + num_components)
    inputs = (h, weight, bias, log_strength, token_ids, match_weight, match_bias, by_length)
    results = (predicted_ids, match_lengths, all_ids, log_weights)
    sizes = (h.numel() // width, _WORK_OF_SHARES + width * num_components)
    run_rows(_weigh_rows, form, *sizes, width, num_slots, num_buckets, *inputs, *results)
    return all_ids, log_weights


def _run_backward(
    h: Tensor, weight: Tensor, match_weight: Tensor, by_length: Tensor, predicted_ids: Tensor,
    match_lengths: Tensor, log_weights: Tensor, _: Tensor, dlog_weights: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    width, num_slots, num_buckets = h.shape[-1], weight.shape[0], by_length.shape[0]
    form = _PointerForm(LANES, (0,) * match_weight.shape[0])
    num_components = num_slots + len(form.matched)
    num_rows = h.numel() // width
    num_spans = count_spans(-(-num_rows // TILE))
    dh = h.new_empty(h.shape)
    dlog_strength, dprobe = h.new_empty(2, *h.shape[:-1], num_slots)
    counts = (num_components * width, num_components, num_buckets)
    grads = h.new_empty(num_spans, sum(counts))
    work = num_rows * (_WORK_OF_SHARES + 2 * counts[0]) // num_spans
    sizes = (num_spans, num_rows, width, num_slots, num_buckets)
    inputs = (h, weight, match_weight, predicted_ids, match_lengths, log_weights)
    results = (dlog_weights, dh, dlog_strength, dprobe, grads)
    run_rows(_backward_spans, form, num_spans, work, *sizes, *inputs, *results)
    dweights, dbiases, dby_length = sum_spans(grads).split(counts)
    of_slots = dweights[: weight.numel()].view_as(weight), dbiases[:num_slots]
    of_match = dweights[weight.numel() :].view_as(match_weight), dbiases[num_slots:]
    return dh, *of_slots, dlog_strength, dprobe, *of_match, dby_length


_weigh_retrieved = declare_operator(
    "weigh_retrieved",
    _run_forward,
    backward=_run_backward,
    results="all_ids log_weights",
    gradients="h weight bias log_strength probe match_weight match_bias by_length",
)


def weigh_retrieved_native(
    h: Tensor, slots: FoundInSlots | None, match: FoundMatch | None
) -> tuple[Tensor, Tensor]:
    """Weigh retrieved tokens against the vocabulary's distribution, whose score is 0 (E17).

    Args:
        h: [..., D].
        slots: what slots found, or ``None``.
        match: what the automaton predicts, or ``None``; one of both is given.

    Returns:
        token ids [..., K] int64, those of the slots first; ln of the shares [..., 1 + K], the
        vocabulary's first, -inf for what was not found.
    """
    none, no_rows = h.new_empty(0), h.new_empty(0, h.shape[-1])
    no_ids = torch.empty(0, dtype=torch.int64)
    weight, bias, token_ids, *of_slots = slots or (no_rows, none, no_ids, none, None)
    *of_match, predicted_ids, lengths = match or (no_rows, none, none, no_ids, no_ids)
    weighed: tuple[Tensor, Tensor] = _weigh_retrieved(
        h, weight, bias, *of_slots, *of_match, token_ids, predicted_ids, lengths
    )
    return weighed
