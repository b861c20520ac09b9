"""What slots found, weighed and mixed, in Numba: one pass forward, two short ones backward.

The backward pass also judges the writes in hindsight, as ``ops.hindsight`` does.
"""
# mypy: allow-untyped-defs

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from unimatrix.ops.hindsight import LABELS, LEAST_WEIGHT, HindsightRules, HindsightScale
from unimatrix.ops.numba.compile import kernel
from unimatrix.ops.numba.lanes import OPTIONS, at, pointer
from unimatrix.ops.numba.products import LANES
from unimatrix.ops.numba.threads import run_rows
from unimatrix.ops.numba.tiles import TILE, add_multiple, count_spans, multiply_rows, sum_spans
from unimatrix.ops.operator import declare_operator
from unimatrix.ops.selective_slots.state import CODES_PER_NAT, SlotLookup

_WORK_OF_SHARES = 1000
"""Multiply-adds in the time that a read's exponentials take."""
_ATTRIBUTION, _READ_HIT, _READ_WEIGHT = range(len(LABELS))


class FoundValues(NamedTuple):
    """What is made of a lookup.

    Attributes:
        context: [B, T, D], weighted sums of the values.
        log_strength: [B, T, Q], ln of the strengths; -inf where nothing was found.
        probe: [B, T, Q] zeros for the pointer (``ops.hindsight``); ``None`` without rules.
        scale: to be added to the loss; ``None`` without rules.
    """

    context: Tensor
    log_strength: Tensor
    probe: Tensor | None
    scale: HindsightScale | None


@kernel(**OPTIONS)
def _read_rows(
    first, last, lanes, width, num_reads, entries, codes, value_ids, read_score, table,
    context, log_strength, weights,
):  # fmt: skip
    Q = num_reads
    for row in range(first, last):
        target, shares = pointer(context, row * width), pointer(weights, row * Q)
        strengths = pointer(log_strength, row * Q)
        for j in range(width):
            target[j] = 0
        best = 0.0
        for q in range(Q):
            strengths[q] = -math.inf
            if entries[row * Q + q] >= 0:
                held = codes[row * Q + q] / CODES_PER_NAT
                strengths[q] = min(held, 0.0) - math.log1p(math.exp(-abs(held)))
            shares[q] = read_score[q] + strengths[q]
            best = max(best, shares[q])
        power_sum = math.exp(-best)
        for q in range(Q):
            shares[q] = math.exp(shares[q] - best)
            power_sum += shares[q]
        for q in range(Q):
            shares[q] /= power_sum
            if entries[row * Q + q] >= 0:
                value = pointer(table, value_ids[row * Q + q] * width)
                add_multiple(lanes, value, shares[q], width, target)


@kernel(**OPTIONS)
def _backward_spans(
    first, last, lanes, num_spans, num_rows, width, num_reads, label,
    entries, codes, value_ids, table, weights, dcontext, dlog_strength, dprobe, scale,
    worths, dheld, grads,
):  # fmt: skip
    """Set the worth of every read, and the gradient of the logit that gave it its strength."""
    Q = num_reads
    num_grads = len(grads) // num_spans
    slopes = np.empty(Q, weights.dtype)
    for span in range(first, last):
        grads[span * num_grads : (span + 1) * num_grads] = 0
        dscore = pointer(grads, span * num_grads)
        dtable = at(dscore, Q)
        for row in range(span * num_rows // num_spans, (span + 1) * num_rows // num_spans):
            grad, mean = pointer(dcontext, row * width), 0.0
            for q in range(Q):
                place = row * Q + q
                value, share = value_ids[place] * width, weights[place]
                slopes[q], worths[place] = 0, 0
                if entries[place] < 0:
                    continue
                slopes[q] = share * multiply_rows(lanes, grad, pointer(table, value), width)
                mean += slopes[q]
                add_multiple(lanes, grad, share, width, at(dtable, value))
                if label == _ATTRIBUTION:
                    worths[place] = -(slopes[q] + dprobe[place]) / scale[0]
                elif share > LEAST_WEIGHT:
                    is_hit = dprobe[place] < -LEAST_WEIGHT * scale[0]
                    worths[place] = 1 if label == _READ_WEIGHT or is_hit else 0
            for q in range(Q):
                place = row * Q + q
                slope = slopes[q] - weights[place] * mean
                dscore[q] += slope
                dheld[place] = 0
                if entries[place] >= 0:
                    held = codes[place] / CODES_PER_NAT
                    dheld[place] = (slope + dlog_strength[place]) / (1 + math.exp(held))


@kernel(**OPTIONS)
def _judge_rows(
    first, last, lanes, num_reads, num_writes, num_initial, judges, label,
    entries, worths, dheld, logits, offered, rules, dlogits, dinitial,
):  # fmt: skip
    """Sum the gradients of each write's reads, and add that of the gate's loss."""
    share, floor, factor = rules[0], rules[1], rules[2]
    sums = np.empty(num_writes, worths.dtype)
    for row in range(first, last):
        slopes, slots = pointer(dlogits, row * num_writes), pointer(dinitial, row * num_initial)
        for m in range(num_initial):
            slots[m] = 0
        for w in range(num_writes):
            sums[w], slopes[w] = 0, 0
        for place in range(row * num_reads, (row + 1) * num_reads):
            w = entries[place] - num_initial
            if w >= 0:
                sums[w] += worths[place]
                slopes[w] += dheld[place]
            elif entries[place] >= 0:
                slots[entries[place]] += dheld[place]
        if judges == 0:
            continue
        least = 0.0
        if label == _ATTRIBUTION:
            largest = sums[0]
            for w in range(num_writes):
                largest = max(largest, sums[w])
            least = max(share * largest, floor)
        for w in range(num_writes):
            place = row * num_writes + w
            if offered[place]:
                strength = 1 / (1 + math.exp(-logits[place]))
                slopes[w] += factor * (strength - (sums[w] > least))


def _run_forward(
    entries: Tensor, codes: Tensor, value_ids: Tensor, offered: Tensor,
    rules: HindsightRules | None, logits: Tensor, initial_logits: Tensor, read_score: Tensor,
    table: Tensor,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    (*lead, num_reads), width = entries.shape, table.shape[1]
    context = table.new_empty(*lead, width)
    log_strength, weights = (table.new_empty(entries.shape) for _ in range(2))
    inputs = (entries, codes, value_ids, read_score, table, context, log_strength, weights)
    rows = context.numel() // width, num_reads * (_WORK_OF_SHARES + 2 * width)
    run_rows(_read_rows, LANES, *rows, width, num_reads, *inputs)
    if rules is None:
        return context, log_strength, None, None, None, weights
    return context, log_strength, torch.zeros_like(weights), *table.new_zeros(2), weights


def _run_backward(
    entries: Tensor, codes: Tensor, value_ids: Tensor, offered: Tensor, logits: Tensor,
    initial_logits: Tensor, table: Tensor, weights: Tensor, rules: HindsightRules | None,
    dcontext: Tensor, dlog_strength: Tensor, dprobe: Tensor, dtarget: Tensor, dgate: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    width, (batch, num_initial) = table.shape[1], initial_logits.shape
    num_tokens, num_reads = entries.shape[1:]
    scale, label, judged = 1.0, _READ_WEIGHT, (0.0, 0.0, 0.0)
    if rules is None:
        dprobe = dlog_strength
    else:
        label = LABELS.index(rules.label)
        scale = max(abs(float(dtarget)), torch.finfo(table.dtype).tiny)
        factor = rules.weight * float(dgate) / max(int(offered.sum()), 1)
        judged = (rules.share, rules.floor, factor)
    num_rows = batch * num_tokens
    num_spans = count_spans(-(-num_rows // TILE))
    worths, dheld = weights.new_empty(2, *weights.shape)
    by_weights = table.new_empty(num_spans, num_reads + table.numel())
    sizes = (num_spans, num_rows, width, num_reads, label)
    inputs = (entries, codes, value_ids, table, weights, dcontext, dlog_strength, dprobe)
    work = num_rows * num_reads * (_WORK_OF_SHARES + 3 * width) // num_spans
    results = (weights.new_tensor([scale]), worths, dheld, by_weights)
    run_rows(_backward_spans, LANES, num_spans, work, *sizes, *inputs, *results)
    dlogits, dinitial = logits.new_empty(logits.shape), initial_logits.new_empty(batch, num_initial)
    num_writes = logits[0].numel()
    counts = (num_tokens * num_reads, num_writes, num_initial, int(rules is not None), label)
    reads = (entries, worths, dheld, logits, offered, logits.new_tensor(judged))
    run_rows(_judge_rows, LANES, batch, 16 * num_writes, *counts, *reads, dlogits, dinitial)
    dscore, dtable = sum_spans(by_weights).split([num_reads, table.numel()])
    return dlogits, dinitial, dscore, dtable.view(table.shape)


_read_found = declare_operator(
    "read_found",
    _run_forward,
    backward=_run_backward,
    results="context log_strength probe of_target of_gate",
    saved="weights",
    gradients="logits initial_logits read_score table",
)


def read_found_native(
    lookup: SlotLookup, logits: Tensor, initial_logits: Tensor, read_score: Tensor, table: Tensor,
    offered: Tensor, rules: HindsightRules | None,
) -> FoundValues:  # fmt: skip
    """Weigh what was found by its strength, and sum its values.

    Equation: E13 (the read), E15 and E16 with rules.

    Args:
        lookup: what was found.
        logits: [B, T, N], those of the writes' strengths; a strength has the value of its code and
            the gradient of its logit.
        initial_logits: [B, M], likewise of the slots before.
        read_score: [Q], added to ln of a strength; reading nothing has a score of 0.
        table: [V, D], the value of every token id.
        offered: [B, T, N] bool, whether the position offered that write.
        rules: how a write is judged in hindsight; ``None`` is not at all.

    Returns:
        see ``FoundValues``. Differentiable once in the four floats.
    """
    weights = (logits, initial_logits, read_score, table)
    context, log_strength, probe, *scale = _read_found(*lookup, offered, rules, *weights)
    told = None if rules is None else HindsightScale(scale[0], scale[1], offered.sum())
    return FoundValues(context, log_strength, probe, told)
