"""Norm, feed-forward network and residual sum in Numba: one pass forward, one backward.

Each thread takes a few rows at a time through all of it, so that what stands between the products
is in its cache. The activations and their derivatives are kept for the backward pass.
"""
# mypy: allow-untyped-defs

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from unimatrix.ops.fused_passes.gated_sum_native import squash
from unimatrix.ops.fused_passes.tiles_native import (
    TILE,
    add_rows,
    copy_rows,
    count_spans,
    needs_gradient,
    normalize_tile,
    normalize_tile_backward,
    sum_spans,
)
from unimatrix.ops.lanes_native import (
    OPTIONS,
    at,
    exponential,
    load,
    minus,
    over,
    plus,
    pointer,
    store,
    times,
    where_negative,
    zeros,
)
from unimatrix.ops.products_native import LANES, cut_panels, multiply
from unimatrix.ops.threads import run_rows

# ln(erfc(z) / t) + z^2 with t = 2 / (2 + z), as a polynomial in 2 t - 1: a Chebyshev fit to the
# last bits of float32 and of float64.
_TAIL_32 = (
    -0.6717940760543342, 0.6726422171554879, 0.047343106290901014, -0.04687488817886134,
    -0.009873768747331393, 0.008703812035218805, 0.0017765646350106873, -0.002048734760496573,
    -0.00020790912059481928, 0.00033373589390861395,
)  # fmt: skip
_TAIL_64 = (
    -0.6717940840566923, 0.6726432239776567, 0.04734330684190443, -0.0468956102311753,
    -0.009872689366389959, 0.008824938557060623, 0.001758933557799016, -0.002345812500482853,
    -0.00014624686337800336, 0.000673678795580235, -9.37350311709817e-05, -0.0001743029472030762,
    7.14010141275703e-05, 3.17451797494374e-05, -3.0187884551394243e-05, 1.3772664134464417e-07,
    8.562623420121286e-06, -2.947986876998259e-06, -1.27231190486887e-06, 1.2500276612569754e-06,
    -1.6849800720653297e-07, -2.495832761719667e-07, 1.5334345920908177e-07, 1.444865804625267e-09,
    -3.9171820510271855e-08, 1.1172352263623759e-08, 4.06088214696972e-09, -1.8902306008944537e-09,
)  # fmt: skip

_DENSITY_AT_0 = 1 / math.sqrt(2 * math.pi)


class _Form(NamedTuple):
    """What a kernel is compiled for, as tuples: their lengths are part of the Numba type."""

    lanes: tuple[int, ...]
    centred: tuple[int, ...]  # empty: the norm is RMSNorm
    gated: tuple[int, ...]  # empty: the network is GELU, with biases
    double: tuple[int, ...]  # empty: float32


@numba.njit(**OPTIONS)
def _integrate_normal(form, x):
    """Return the standard normal distribution's integral up to each lane."""
    nothing = minus(x, x)
    z = times(where_negative(x, times(x, -1.0), x), math.sqrt(0.5))
    share = over(plus(nothing, 2.0), plus(z, 2.0))
    place, power = plus(times(share, 2.0), -1.0), nothing
    if len(form.double):
        for n in range(len(_TAIL_64) - 1, -1, -1):
            power = plus(times(power, place), _TAIL_64[n])
    else:
        for n in range(len(_TAIL_32) - 1, -1, -1):
            power = plus(times(power, place), _TAIL_32[n])
    tail = times(times(share, exponential(minus(power, times(z, z)))), 0.5)
    return where_negative(x, tail, minus(plus(nothing, 1.0), tail))


@numba.njit(**OPTIONS)
def _activate(form, u, u_row, rows, inner, up_bias, a, a_row):
    """Set ``a`` to the activations of ``u``."""
    lanes = form.lanes
    for row in range(rows):
        source, target = at(u, row * u_row), at(a, row * a_row)
        for j in range(0, inner, len(lanes)):
            gate = load(source, j, lanes)
            if len(form.gated):
                share = squash(gate, plus(zeros(source, lanes), 1.0))
                store(target, j, times(times(gate, share), load(source, inner + j, lanes)))
            else:
                gate = plus(gate, load(up_bias, j, lanes))
                store(target, j, times(gate, _integrate_normal(form, gate)))


@numba.njit(**OPTIONS)
def _activate_and_slope(form, u, u_row, rows, inner, up_bias, a, a_row, slopes, slopes_row):
    """Set ``a`` to the activations of ``u``, and ``slopes`` to the derivatives of ``a`` by it."""
    lanes = form.lanes
    for row in range(rows):
        source, target, slope = at(u, row * u_row), at(a, row * a_row), at(slopes, row * slopes_row)
        ones = plus(zeros(source, lanes), 1.0)
        for j in range(0, inner, len(lanes)):
            gate = load(source, j, lanes)
            if len(form.gated):
                up, share = load(source, inner + j, lanes), squash(gate, ones)
                let = times(gate, share)
                store(target, j, times(let, up))
                store(slope, j, times(up, plus(share, times(let, minus(ones, share)))))
                store(slope, inner + j, let)
            else:
                gate = plus(gate, load(up_bias, j, lanes))
                share = _integrate_normal(form, gate)
                density = times(exponential(times(times(gate, gate), -0.5)), _DENSITY_AT_0)
                store(target, j, times(gate, share))
                store(slope, j, plus(share, times(gate, density)))


@numba.njit(**OPTIONS)
def _pass_activation(form, slopes, slopes_row, da, a_row, rows, inner, du, u_row, dup_bias):
    """Set ``du`` to the gradient before the activation; add to that of the bias."""
    lanes = form.lanes
    for row in range(rows):
        slope, grad = at(slopes, row * slopes_row), at(da, row * a_row)
        target = at(du, row * u_row)
        for j in range(0, inner, len(lanes)):
            along = load(grad, j, lanes)
            inward = times(along, load(slope, j, lanes))
            store(target, j, inward)
            if len(form.gated):
                store(target, inner + j, times(along, load(slope, inner + j, lanes)))
            else:
                store(dup_bias, j, plus(load(dup_bias, j, lanes), inward))


@numba.njit(cache=True, **OPTIONS)
def _apply_spans(
    first, last, form, num_spans, num_rows, width, inner, x, eps, scale, shift,
    up_across, up_bias, down_across, down_bias, kept, y,
):  # fmt: skip
    D, F, W = width, inner, len(form.lanes)
    P = 2 * F if len(form.gated) else F
    u_row, a_row = P + W, F + W  # apart by no power of two
    scratch = np.empty(TILE * (2 * D + u_row + a_row + 1), x.dtype)
    units, h, u = pointer(scratch, 0), pointer(scratch, TILE * D), pointer(scratch, 2 * TILE * D)
    a = at(u, TILE * u_row)
    inverses = at(a, TILE * a_row)
    a_row = P + a_row if len(kept) else a_row
    end = last * num_rows // num_spans
    for start in range(first * num_rows // num_spans, end, TILE):
        rows = min(TILE, end - start)
        source, target = pointer(x, start * D), pointer(y, start * D)
        normalize_tile(
            form, source, rows, D, eps[0], pointer(scale, 0), pointer(shift, 0),
            units, h, D, inverses,
        )  # fmt: skip
        multiply(form.lanes, h, D, 1, pointer(up_across, 0), D * W, W, u, u_row, rows, P, D, False)
        bias = pointer(up_bias, 0)
        if len(kept):
            slopes = pointer(kept, start * a_row)
            a = at(slopes, P)
            _activate_and_slope(form, u, u_row, rows, F, bias, a, a_row, slopes, a_row)
            for row in range(rows):  # what is to spare, so that nothing comes undefined
                store(a, row * a_row + F, zeros(a, form.lanes))
        else:
            _activate(form, u, u_row, rows, F, bias, a, a_row)
        for row in range(rows):
            for j in range(0, D, W):
                sums = load(source, row * D + j, form.lanes)
                if len(form.gated) == 0:
                    sums = plus(sums, load(pointer(down_bias, 0), j, form.lanes))
                store(target, row * D + j, sums)
        multiply(
            form.lanes, a, a_row, 1, pointer(down_across, 0), F * W, W, target, D, rows, D, F, True
        )


@numba.njit(cache=True, **OPTIONS)
def _backward_spans(
    first, last, form, num_spans, num_rows, width, inner, x, eps, scale, shift,
    up, down, kept, dy, dx, grads,
):  # fmt: skip
    lanes, D, F, W = form.lanes, width, inner, len(form.lanes)
    P = 2 * F if len(form.gated) else F
    h_row, u_row, a_row = D + W, P + W, F + W  # apart by no power of two
    num_grads = len(grads) // num_spans
    kept_row = P + a_row
    scratch = np.empty(TILE * (2 * D + h_row + u_row + a_row + 1), x.dtype)
    units, dh, h = pointer(scratch, 0), pointer(scratch, TILE * D), pointer(scratch, 2 * TILE * D)
    u = at(h, TILE * h_row)
    da = at(u, TILE * u_row)
    inverses = at(da, TILE * a_row)
    for span in range(first, last):
        grads[span * num_grads : (span + 1) * num_grads] = 0
        dup = pointer(grads, span * num_grads)
        ddown = at(dup, P * D)
        dscale = at(ddown, D * F)
        dshift, dup_bias = at(dscale, D), at(dscale, 2 * D)
        ddown_bias = at(dup_bias, P)
        end = (span + 1) * num_rows // num_spans
        for start in range(span * num_rows // num_spans, end, TILE):
            rows = min(TILE, end - start)
            source, grad = pointer(x, start * D), pointer(dy, start * D)
            normalize_tile(
                form, source, rows, D, eps[0], pointer(scale, 0), pointer(shift, 0),
                units, h, h_row, inverses,
            )  # fmt: skip
            slopes = pointer(kept, start * kept_row)
            a = at(slopes, P)
            multiply(lanes, grad, 1, D, a, W, kept_row, ddown, F, D, F, rows, True)
            multiply(lanes, grad, D, 1, pointer(down, 0), D * W, W, da, a_row, rows, F, D, False)
            _pass_activation(form, slopes, kept_row, da, a_row, rows, F, u, u_row, dup_bias)
            multiply(lanes, u, 1, u_row, h, W, h_row, dup, D, P, D, rows, True)
            multiply(lanes, u, u_row, 1, pointer(up, 0), P * W, W, dh, D, rows, D, P, False)
            if len(form.gated) == 0:
                add_rows(lanes, grad, rows, D, ddown_bias)
            copy_rows(lanes, grad, pointer(dx, start * D), rows * D)
            normalize_tile_backward(
                form, dh, units, inverses, rows, D, pointer(scale, 0),
                pointer(dx, start * D), dscale, dshift,
            )  # fmt: skip


class FeedForwardWeights(NamedTuple):
    """Weights of norm and network; [D] and [F] padded to [F'], a multiple of the kernel's lanes.

    Attributes:
        scale: [D], of the norm.
        shift: [D], of LayerNorm; ``None`` is RMSNorm.
        up: [F', D], or [2 F', D] with the gate first.
        up_bias: [F'], of a network with GELU; ``None`` with a gate.
        down: [D, F'].
        down_bias: [D], or ``None`` with a gate.
    """

    scale: Tensor
    shift: Tensor | None
    up: Tensor
    up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


class PreparedFeedForward(NamedTuple):
    """Weights in the order in which the kernels read them, for several passes.

    Attributes:
        weights: to which gradients go.
        eps: [1], of the norm.
        up, up_across, down, down_across: matrices and their transposes from ``cut_panels``.
    """

    weights: FeedForwardWeights
    eps: Tensor
    up: Tensor
    up_across: Tensor
    down: Tensor
    down_across: Tensor


def prepare(
    scale: Tensor,
    shift: Tensor | None,
    eps: float,
    up: Sequence[Tensor],
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
) -> PreparedFeedForward:
    """Pad and reorder weights.

    Args:
        scale, shift, eps: of the norm.
        up: one [F, D], or with a gate two, the gate's first.
        up_bias, down, down_bias: as in ``FeedForwardWeights``, not padded.
    """
    missing = -down.shape[1] % len(LANES)
    # A gate of zero closes a column, and GELU of zero is zero.
    padded = torch.cat([pad(matrix, (0, 0, 0, missing)) for matrix in up])
    up_bias = None if up_bias is None else pad(up_bias, (0, missing))
    down = pad(down, (0, missing))
    weights = FeedForwardWeights(scale, shift, padded, up_bias, down, down_bias)
    panels = (cut_panels(matrix) for matrix in (padded, padded.t(), down, down.t()))
    return PreparedFeedForward(weights, scale.new_tensor([eps]), *panels)


def _plan(x: Tensor, prepared: PreparedFeedForward) -> tuple[_Form, int, tuple[int, ...], int]:
    """Return the kernels' form, spans of rows, sizes, and the multiply-adds of a span."""
    scale, shift, up, up_bias, down, _ = prepared.weights
    (width, inner), num_rows = down.shape, x.numel() // x.shape[-1]
    form = _Form(
        LANES, (0,) * (shift is not None), (0,) * (up_bias is None), (0,) * (scale.itemsize == 8)
    )
    num_spans = count_spans(-(-num_rows // TILE))
    work = num_rows * (up.numel() + down.numel()) // num_spans
    return form, num_spans, (num_rows, width, inner), work


def run_forward(x: Tensor, prepared: PreparedFeedForward, *, saves: bool) -> tuple[Tensor, Tensor]:
    """Run the forward kernel on [..., D]; return the result, and what the backward kernel needs."""
    form, num_spans, sizes, work = _plan(x, prepared)
    scale, shift, _, up_bias, _, down_bias = prepared.weights
    y, none = torch.empty_like(x), x.new_empty(0)
    kept = x.new_empty(sizes[0], count_kept(prepared.weights)) if saves else none
    given = [x, prepared.eps, scale, none if shift is None else shift, prepared.up_across]
    given += [none if up_bias is None else up_bias, prepared.down_across]
    given += [none if down_bias is None else down_bias, kept, y]
    run_rows(_apply_spans, form, num_spans, work, num_spans, *sizes, *given)
    return y, kept


def run_backward(
    x: Tensor, kept: Tensor, prepared: PreparedFeedForward, dy: Tensor
) -> tuple[Tensor, Tensor]:
    """Run the backward kernel; return the gradient of x, and those of the weights in one row."""
    form, num_spans, sizes, work = _plan(x, prepared)
    scale, shift, *_ = prepared.weights
    dx, none = torch.empty_like(x), x.new_empty(0)
    grads = x.new_empty(num_spans, sum(_count(prepared.weights)))
    given = [x, prepared.eps, scale, none if shift is None else shift, prepared.up]
    given += [prepared.down, kept, dy.contiguous(), dx, grads]
    run_rows(_backward_spans, form, num_spans, 3 * work, num_spans, *sizes, *given)
    return dx, sum_spans(grads)


def count_kept(weights: FeedForwardWeights) -> int:
    """Return how many numbers a row keeps for the backward kernel."""
    # Activations and derivatives; and lanes to spare, as rows a power of two apart cost cache.
    return weights.up.shape[0] + weights.down.shape[1] + len(LANES)


def _count(weights: FeedForwardWeights) -> list[int]:
    """Return how many numbers the kernel's gradients have, in its order."""
    width, columns = weights.scale.numel(), weights.up.shape[0]
    return [weights.up.numel(), weights.down.numel(), width, width, columns, width]


def split_gradients(row: Tensor, weights: FeedForwardWeights) -> tuple[Tensor | None, ...]:
    """Return what ``run_backward`` says of each of the weights, ``None`` where there is none."""
    up, down, scale, shift, up_bias, down_bias = row.split(_count(weights))
    grads = (scale, shift, up.view_as(weights.up), up_bias, down.view_as(weights.down), down_bias)
    return tuple(None if w is None else g for w, g in zip(weights, grads, strict=True))


class _AddFeedForward(torch.autograd.Function):
    """The pass with its backward kernel; not differentiable twice."""

    @staticmethod
    def forward(
        ctx: Any, saves: bool, prepared: PreparedFeedForward, x: Tensor, *weights: Tensor | None
    ) -> Tensor:
        x = x.contiguous()
        y, kept = run_forward(x, prepared, saves=saves)
        ctx.save_for_backward(x, kept, *weights, *prepared[1:])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, kept, *given = ctx.saved_tensors
        prepared = PreparedFeedForward(FeedForwardWeights(*given[:6]), *given[6:])
        dx, row = run_backward(x, kept, prepared, dy)
        return None, None, dx, *split_gradients(row, prepared.weights)


def add_feed_forward_native(x: Tensor, prepared: PreparedFeedForward) -> Tensor:
    """Run the pass on the CPU; arguments as in ``add_feed_forward``."""
    saves = needs_gradient(x, *prepared.weights)
    y: Tensor = _AddFeedForward.apply(saves, prepared, x, *prepared.weights)
    return y
