"""Weighted sums around tokens, compiled."""
# mypy: allow-untyped-defs

import torch
from torch import Tensor

from unimatrix.ops.indexed_attention.entries import REACH
from unimatrix.ops.numba.compile import kernel, part
from unimatrix.ops.numba.lanes import OPTIONS, load, plus, pointer, store, times, zeros
from unimatrix.ops.numba.products import LANES
from unimatrix.ops.numba.threads import run_rows
from unimatrix.ops.numba.tiles import TILE, count_spans, sum_spans
from unimatrix.ops.operator import declare_operator


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
