"""Norm, feed-forward network and residual sum in Numba: one pass forward, one backward.

Each thread takes a few rows at a time through all layers, so that everything between the products
stays in its cache. For the backward pass the forward kernel saves what enters the activation.
"""
# mypy: allow-untyped-defs

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from torch.nn.functional import pad

from unimatrix.kernels.passes.gated_sum_native import sigmoid
from unimatrix.kernels.passes.weights import PassWeights, hold_float, join_weights, order_panels
from unimatrix.ops.numba.compile import kernel, part
from unimatrix.ops.numba.gaussian import find_normal_density, integrate_normal
from unimatrix.ops.numba.lanes import (
    OPTIONS,
    at,
    keep,
    load,
    minus,
    plus,
    pointer,
    store,
    times,
    zeros,
)
from unimatrix.ops.numba.products import LANES, multiply
from unimatrix.ops.numba.threads import run_rows
from unimatrix.ops.numba.tiles import (
    TILE,
    add_rows,
    copy_rows,
    count_spans,
    normalize_tile,
    normalize_tile_backward,
    sum_spans,
)
from unimatrix.ops.operator import declare_operator


class _FeedForwardForm(NamedTuple):
    """Options of the kernels as tuples, since Numba compiles a kernel for their lengths."""

    lanes: tuple[int, ...]
    centred: tuple[int, ...]  # empty: the norm is RMSNorm
    gated: tuple[int, ...]  # empty: the network is GELU, with biases
    double: tuple[int, ...]  # empty: float32


@part(**OPTIONS)
def _activate(form, u, u_row, rows, inner, up_bias, a, a_row):
    """Set ``a`` to the activations of ``u``; ``u_row`` and ``a_row`` are the rows' strides."""
    lanes = form.lanes
    for row in range(rows):
        source, target = at(u, row * u_row), at(a, row * a_row)
        for j in range(0, inner, len(lanes)):
            gate = load(source, j, lanes)
            if len(form.gated):
                share = sigmoid(gate, plus(zeros(source, lanes), 1.0))
                store(target, j, times(times(gate, share), load(source, inner + j, lanes)))
            else:
                gate = plus(gate, load(up_bias, j, lanes))
                store(target, j, times(gate, integrate_normal(form.double, gate)))


@part(**OPTIONS)
def _activate_backward(form, u, u_row, rows, inner, up_bias, da, a_row, du, dup_bias):
    """Set ``du`` to the gradient of ``u``, and add to that of the bias.

    ``da`` holds the gradients of the activations, which are overwritten by the activations.
    """
    lanes = form.lanes
    for row in range(rows):
        source, grad, target = at(u, row * u_row), at(da, row * a_row), at(du, row * u_row)
        ones = plus(zeros(source, lanes), 1.0)
        for j in range(0, inner, len(lanes)):
            gate, da_j = load(source, j, lanes), load(grad, j, lanes)
            if len(form.gated):
                up, share = load(source, inner + j, lanes), sigmoid(gate, ones)
                silu = times(gate, share)
                slope = plus(share, times(silu, minus(ones, share)))
                store(target, j, times(times(da_j, up), slope))
                store(target, inner + j, times(da_j, silu))
                store(grad, j, times(silu, up))
            else:
                gate = plus(gate, load(up_bias, j, lanes))
                share = integrate_normal(form.double, gate)
                slope = plus(share, times(gate, find_normal_density(gate)))
                du_j = times(da_j, slope)
                store(target, j, du_j)
                store(dup_bias, j, plus(load(dup_bias, j, lanes), du_j))
                store(grad, j, times(gate, share))


@kernel(**OPTIONS)
def _apply_spans(
    first, last, form, num_spans, num_rows, width, inner, x, eps, weights, panels, saved_u, y,
):  # fmt: skip
    D, F, W = width, inner, len(form.lanes)
    P = 2 * F if len(form.gated) else F
    scale = pointer(weights, D * (P + F))
    shift = at(scale, D)
    up_bias = at(scale, D * (1 + len(form.centred)))
    down_bias = at(up_bias, F)
    up_across = pointer(panels, 0)
    down_across = at(up_across, D * P)
    u_row, a_row = P + W, F + W  # no power of two apart
    scratch = np.empty(TILE * (2 * D + u_row + a_row + 1), x.dtype)
    units, h, u = pointer(scratch, 0), pointer(scratch, TILE * D), pointer(scratch, 2 * TILE * D)
    a = at(u, TILE * u_row)
    inverses = at(a, TILE * a_row)
    end = last * num_rows // num_spans
    for start in range(first * num_rows // num_spans, end, TILE):
        rows = min(TILE, end - start)
        source, target = pointer(x, start * D), pointer(y, start * D)
        normalize_tile(form, source, rows, D, eps[0], scale, shift, units, h, D, inverses)
        if len(saved_u):
            u = pointer(saved_u, start * u_row)
            for row in range(rows):  # fill the spare lanes, so that no saved number is undefined
                store(u, row * u_row + P, zeros(u, form.lanes))
        multiply(form.lanes, h, D, 1, up_across, D * W, W, u, u_row, rows, P, D, False)
        _activate(form, u, u_row, rows, F, up_bias, a, a_row)
        for row in range(rows):
            for j in range(0, D, W):
                sums = load(source, row * D + j, form.lanes)
                if len(form.gated) == 0:
                    sums = plus(sums, load(down_bias, j, form.lanes))
                store(target, row * D + j, sums)
        multiply(form.lanes, a, a_row, 1, down_across, F * W, W, target, D, rows, D, F, True)
    keep(scratch)


@kernel(**OPTIONS)
def _backward_spans(
    first, last, form, num_spans, num_rows, width, inner, x, eps, weights, panels, saved_u,
    dy, dx, grads,
):  # fmt: skip
    lanes, D, F, W = form.lanes, width, inner, len(form.lanes)
    P, num_norms = 2 * F if len(form.gated) else F, 1 + len(form.centred)
    scale = pointer(weights, D * (P + F))
    shift = at(scale, D)
    up_bias = at(scale, D * num_norms)
    up = pointer(panels, D * (P + F))
    down = at(up, P * D)
    h_row, u_row, a_row = D + W, P + W, F + W  # no power of two apart
    num_grads = len(grads) // num_spans
    scratch = np.empty(TILE * (2 * D + h_row + u_row + a_row + 1), x.dtype)
    units, dh, h = pointer(scratch, 0), pointer(scratch, TILE * D), pointer(scratch, 2 * TILE * D)
    u = at(h, TILE * h_row)
    a = at(u, TILE * u_row)
    inverses = at(a, TILE * a_row)
    for span in range(first, last):
        grads[span * num_grads : (span + 1) * num_grads] = 0
        dup = pointer(grads, span * num_grads)
        ddown = at(dup, P * D)
        dscale = at(ddown, D * F)
        dshift, dup_bias = at(dscale, D), at(dscale, num_norms * D)
        ddown_bias = at(dup_bias, F)
        end = (span + 1) * num_rows // num_spans
        for start in range(span * num_rows // num_spans, end, TILE):
            rows = min(TILE, end - start)
            source, grad = pointer(x, start * D), pointer(dy, start * D)
            normalize_tile(form, source, rows, D, eps[0], scale, shift, units, h, h_row, inverses)
            multiply(lanes, grad, D, 1, down, D * W, W, a, a_row, rows, F, D, False)
            before = pointer(saved_u, start * u_row)
            _activate_backward(form, before, u_row, rows, F, up_bias, a, a_row, u, dup_bias)
            multiply(lanes, grad, 1, D, a, W, a_row, ddown, F, D, F, rows, True)
            multiply(lanes, u, 1, u_row, h, W, h_row, dup, D, P, D, rows, True)
            multiply(lanes, u, u_row, 1, up, P * W, W, dh, D, rows, D, P, False)
            if len(form.gated) == 0:
                add_rows(lanes, grad, rows, D, ddown_bias)
            copy_rows(lanes, grad, pointer(dx, start * D), rows * D)
            normalize_tile_backward(
                form, dh, units, inverses, rows, D, scale, pointer(dx, start * D), dscale, dshift,
            )  # fmt: skip
    keep(scratch)


class FeedForwardSizes(NamedTuple):
    """Sizes of the row of weights: up, down, scale, shift, and both biases of a GELU network.

    Attributes:
        width: D.
        inner: F', the inner features, filled up with zeros to a multiple of the kernels' lanes.
        is_centred: 1 if the norm is LayerNorm, which has a shift.
        is_gated: 1 if ``up`` holds the gate's matrix first.
        u_stride: numbers from row to row of the saved features, spare lanes included.
    """

    width: int
    inner: int
    is_centred: int
    is_gated: int
    u_stride: int


def prepare_feed_forward(
    scale: Tensor, shift: Tensor | None, eps: float, up: Sequence[Tensor], up_bias: Tensor | None,
    down: Tensor, down_bias: Tensor | None,
) -> PassWeights:  # fmt: skip
    """Join the weights of norm and network.

    Args:
        scale, shift, eps: [D] each, of the norm; no shift is RMSNorm.
        up: one [F, D], or with a gate two, the gate's first.
        up_bias: [F], of a network with GELU; ``None`` with a gate.
        down: [D, F].
        down_bias: [D], or ``None`` with a gate.
    """
    width, inner = down.shape
    missing = -inner % len(LANES)
    if missing:
        # Columns of zeros add nothing: their gate is closed, and GELU of zero is zero.
        zeros = down.new_zeros(missing * width)
        up = [part for matrix in up for part in (matrix, zeros)]
        down, inner = pad(down, (0, missing)), inner + missing
        up_bias = None if up_bias is None else pad(up_bias, (0, missing))
    is_gated = up_bias is None
    columns = 2 * inner if is_gated else inner
    # Spare lanes behind what enters the activation: rows a power of two apart cost cache.
    u_stride = columns + len(LANES)
    sizes = FeedForwardSizes(width, inner, int(shift is not None), int(is_gated), u_stride)
    order = order_panels(((0, columns, width), (columns * width, width, inner)))
    others = [weight for weight in (scale, shift, up_bias, down_bias) if weight is not None]
    return join_weights([*up, down, *others], order, sizes, eps)


def _plan(
    x: Tensor, row: Tensor, panels: Tensor, sizes: Sequence[int], eps: float
) -> tuple[_FeedForwardForm, int, int, tuple[int, ...], tuple[Any, ...]]:
    """Return form, spans of rows, work of a span, sizes and first inputs of both kernels."""
    num_rows = x.numel() // x.shape[-1]
    width, inner, is_centred, is_gated, _ = FeedForwardSizes(*sizes)
    form = _FeedForwardForm(LANES, (0,) * is_centred, (0,) * is_gated, (0,) * (x.itemsize == 8))
    num_spans = count_spans(-(-num_rows // TILE))
    work = num_rows * row.numel() // num_spans
    inputs = (x, hold_float(eps, x.dtype), row, panels)
    return form, num_spans, work, (num_spans, num_rows, width, inner), inputs


def run_forward(
    x: Tensor, row: Tensor, panels: Tensor, sizes: Sequence[int], eps: float, *, saves: bool
) -> tuple[Tensor, Tensor]:
    """Run the forward kernel on [..., D]; return the result and what enters the activation."""
    form, num_spans, work, counts, inputs = _plan(x, row, panels, sizes, eps)
    saved_u = x.new_empty(counts[1] if saves else 0, sizes[-1])
    y = x.new_empty(x.shape)
    run_rows(_apply_spans, form, num_spans, work, *counts, *inputs, saved_u, y)
    return y, saved_u


def run_backward(
    x: Tensor, saved_u: Tensor, row: Tensor, panels: Tensor, sizes: Sequence[int], eps: float,
    dy: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run the backward kernel; return the gradients of x and of the row of weights."""
    form, num_spans, work, counts, inputs = _plan(x, row, panels, sizes, eps)
    dx, dweights = x.new_empty(x.shape), x.new_empty(num_spans, row.numel())
    arrays = (*inputs, saved_u, dy, dx, dweights)
    run_rows(_backward_spans, form, num_spans, 3 * work, *counts, *arrays)
    return dx, sum_spans(dweights)


_add_feed_forward = declare_operator(
    "add_feed_forward",
    run_forward,
    backward=run_backward,
    results="y",
    saved="saved_u",
    gradients="x row",
    shapes=lambda x, row, panels, sizes, eps: (
        x.new_empty(x.shape),
        x.new_empty(x.numel() // x.shape[-1], sizes[-1]),
    ),
    gradient_shapes=lambda x, saved_u, row, *_: (x.new_empty(x.shape), row.new_empty(row.shape)),
)


def add_feed_forward_native(x: Tensor, weights: PassWeights) -> Tensor:
    """Return the stream and what a feed-forward network makes of its norm.

    Equation: E23.

    Args:
        x: [..., D].
        weights: from ``prepare_feed_forward``.

    Returns:
        [..., D].
    """
    y: Tensor = _add_feed_forward(x, *weights)
    return y
