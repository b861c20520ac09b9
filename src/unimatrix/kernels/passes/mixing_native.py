"""Readout projection, gates and gated sum of the mixers in Numba: one pass forward, one backward.

As in ``feed_forward_native``, a few rows at a time go through all of it.
"""
# mypy: allow-untyped-defs

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from unimatrix.kernels.passes.gated_sum_native import squash
from unimatrix.kernels.passes.weights import PassWeights, join_weights, order_panels
from unimatrix.ops.numba.compile import kernel
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
from unimatrix.ops.numba.tiles import TILE, count_spans, needs_gradient, sum_spans


class MixingSizes(NamedTuple):
    """What the row of weights holds: the readout's projection, the gates' matrices and biases.

    Attributes:
        width: D, a multiple of the kernels' lanes.
        inner: R, likewise, of the readout before its projection.
        num_gates: G.
    """

    width: int
    inner: int
    num_gates: int


def prepare_mixing(
    out: Tensor, gates: Sequence[Tensor], gates_bias: Sequence[Tensor]
) -> PassWeights:
    """Join the weights of projection and gates.

    Args:
        out: [D, R], of the readout's projection.
        gates, gates_bias: [.., D] and [..] each, of the gates of G contexts, G D together, the
            readout's first.
    """
    width, inner = out.shape
    columns = sum(matrix.shape[0] for matrix in gates)
    order = order_panels(((0, width, inner), (width * inner, columns, width)))
    sizes = MixingSizes(width, inner, columns // width)
    return join_weights([out, *gates, *gates_bias], order, sizes)


@kernel(**OPTIONS)
def _apply_spans(
    first, last, lanes, num_spans, num_rows, width, inner, num_gates,
    x, h, readout, one, two, weights, panels, kept_gates, kept_readout, y,
):  # fmt: skip
    D, R, W, C = width, inner, len(lanes), num_gates * width
    gates_bias = pointer(weights, D * (R + C))
    out_across = pointer(panels, 0)
    gates_across = at(out_across, D * R)
    scratch = np.empty(0 if len(kept_gates) else TILE * (C + D), x.dtype)
    end = last * num_rows // num_spans
    for start in range(first * num_rows // num_spans, end, TILE):
        rows = min(TILE, end - start)
        source, target = pointer(x, start * D), pointer(y, start * D)
        if len(kept_gates):
            gates, projected = pointer(kept_gates, start * C), pointer(kept_readout, start * D)
        else:
            gates, projected = pointer(scratch, 0), pointer(scratch, TILE * C)
        contexts = (projected, pointer(one, start * D), pointer(two, start * D))
        multiply(
            lanes, pointer(readout, start * R), R, 1, out_across, R * W, W,
            projected, D, rows, D, R, False,
        )  # fmt: skip
        multiply(
            lanes, pointer(h, start * D), D, 1, gates_across, D * W, W,
            gates, C, rows, C, D, False,
        )  # fmt: skip
        ones = plus(zeros(source, lanes), 1.0)
        for row in range(rows):
            for j in range(0, D, W):
                mixed = load(source, row * D + j, lanes)
                for n in range(num_gates):
                    place = row * C + n * D + j
                    bias = load(gates_bias, n * D + j, lanes)
                    logits = plus(load(gates, place, lanes), bias)
                    share = squash(logits, ones)
                    store(gates, place, share)
                    mixed = plus(mixed, times(share, load(contexts[n], row * D + j, lanes)))
                store(target, row * D + j, mixed)
    keep(scratch)


@kernel(**OPTIONS)
def _backward_spans(
    first, last, lanes, num_spans, num_rows, width, inner, num_gates,
    h, readout, one, two, kept_gates, kept_readout, panels,
    dy, one_elsewhere, two_elsewhere, dh, dreadout, done, dtwo, grads,
):  # fmt: skip
    D, R, W, C = width, inner, len(lanes), num_gates * width
    out_panels = pointer(panels, D * (R + C))
    gates_panels = at(out_panels, D * R)
    num_grads = len(grads) // num_spans
    slopes_row = C + W  # apart by no power of two
    scratch = np.empty(TILE * (slopes_row + D), dy.dtype)
    slopes, dprojected = pointer(scratch, 0), pointer(scratch, TILE * slopes_row)
    for span in range(first, last):
        grads[span * num_grads : (span + 1) * num_grads] = 0
        dout = pointer(grads, span * num_grads)
        dgates = at(dout, D * R)
        dbias = at(dgates, C * D)
        end = (span + 1) * num_rows // num_spans
        for start in range(span * num_rows // num_spans, end, TILE):
            rows = min(TILE, end - start)
            source, grad = pointer(h, start * D), pointer(dy, start * D)
            read, gates = pointer(readout, start * R), pointer(kept_gates, start * C)
            contexts = (
                pointer(kept_readout, start * D), pointer(one, start * D), pointer(two, start * D),
            )  # fmt: skip
            dcontexts = (dprojected, pointer(done, start * D), pointer(dtwo, start * D))
            elsewhere = (
                dprojected, pointer(one_elsewhere, start * D), pointer(two_elsewhere, start * D),
            )  # fmt: skip
            for row in range(rows):
                for j in range(0, D, W):
                    along = load(grad, row * D + j, lanes)
                    for n in range(num_gates):
                        place, here = row * C + n * D + j, n * D + j
                        share = load(gates, place, lanes)
                        let = times(along, share)
                        slope = minus(let, times(let, share))
                        slope = times(slope, load(contexts[n], row * D + j, lanes))
                        if n > 0 and len(one_elsewhere):
                            let = plus(let, load(elsewhere[n], row * D + j, lanes))
                        store(dcontexts[n], row * D + j, let)
                        store(slopes, row * slopes_row + here, slope)
                        store(dbias, here, plus(load(dbias, here, lanes), slope))
            multiply(lanes, slopes, 1, slopes_row, source, W, D, dgates, D, C, D, rows, True)
            multiply(
                lanes, slopes, slopes_row, 1, gates_panels, C * W, W,
                pointer(dh, start * D), D, rows, D, C, False,
            )  # fmt: skip
            multiply(lanes, dprojected, 1, D, read, W, R, dout, R, D, R, rows, True)
            multiply(
                lanes, dprojected, D, 1, out_panels, D * W, W,
                pointer(dreadout, start * R), R, rows, R, D, False,
            )  # fmt: skip
    keep(scratch)


def _plan(h: Tensor, weights: PassWeights) -> tuple[int, int, tuple[int, ...]]:
    """Return spans of rows, the multiply-adds of one, and the kernels' sizes."""
    num_rows, sizes = h.numel() // h.shape[-1], MixingSizes(*weights.sizes)
    num_spans = count_spans(-(-num_rows // TILE))
    work = num_rows * weights.row.numel() // num_spans
    return num_spans, work, (num_spans, num_rows, *sizes)


def run_forward(
    x: Tensor,
    h: Tensor,
    readout: Tensor,
    contexts: Sequence[Tensor],
    weights: PassWeights,
    *,
    saves: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the forward kernel.

    Returns:
        the stream afterwards, and for the backward kernel the gates and the projected readout.
    """
    num_spans, work, sizes = _plan(h, weights)
    y, num_kept, width = torch.empty_like(x), sizes[1] if saves else 0, x.shape[-1]
    gates = x.new_empty(num_kept, sizes[-1] * width)
    projected = x.new_empty(num_kept, width)
    given = (x, h, readout, *_fill(contexts, h), weights.row, weights.panels)
    run_rows(_apply_spans, LANES, num_spans, work, *sizes, *given, gates, projected, y)
    return y, gates, projected


def run_backward(
    h: Tensor,
    readout: Tensor,
    contexts: Sequence[Tensor],
    kept: Sequence[Tensor],
    weights: PassWeights,
    dy: Tensor,
    elsewhere: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    """Run the backward kernel.

    Args:
        h, readout, contexts, weights: as in ``run_forward``.
        kept: its last results.
        dy: gradient of the stream.
        elsewhere: gradients of the other contexts where they go on beside the pass; empty if that
            is summed elsewhere.

    Returns:
        the gradients of h, of the readout, of the other contexts, and of the row of weights.
    """
    num_spans, work, sizes = _plan(h, weights)
    dh, dreadout = torch.empty_like(h), torch.empty_like(readout)
    dcontexts = [torch.empty_like(context) for context in contexts]
    dweights = h.new_empty(num_spans, weights.row.numel())
    along = [dy, *_fill(elsewhere, h.new_empty(0))]
    given = (h, readout, *_fill(contexts, h), *kept, weights.panels, *along)
    results = (dh, dreadout, *_fill(dcontexts, dh), dweights)
    run_rows(_backward_spans, LANES, num_spans, 3 * work, *sizes, *given, *results)
    return dh, dreadout, dcontexts, sum_spans(dweights)


def _fill(contexts: Sequence[Tensor], other: Tensor) -> list[Tensor]:
    """Return two contexts, ``other`` where there is none: the kernels take as many."""
    return [*contexts, other, other][:2]


class _AddMixed(torch.autograd.Function):
    """The pass with its backward kernel; not differentiable twice."""

    @staticmethod
    def forward(ctx: Any, saves: bool, given: PassWeights, row: Tensor, *streams: Tensor) -> Tensor:
        x, h, readout, *contexts = (stream.contiguous() for stream in streams)
        y, *kept = run_forward(x, h, readout, contexts, given, saves=saves)
        ctx.save_for_backward(row, given.panels, *kept, h, readout, *contexts)
        ctx.sizes = given.sizes
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        row, panels, gates, projected, h, readout, *contexts = ctx.saved_tensors
        weights = PassWeights(row, panels, ctx.sizes)
        dh, dreadout, dcontexts, drow = run_backward(
            h, readout, contexts, (gates, projected), weights, dy
        )
        return None, None, drow, dy, dh, dreadout, *dcontexts


def add_mixed_native(
    x: Tensor, h: Tensor, contexts: Sequence[Tensor], weights: PassWeights
) -> Tensor:
    """Run the pass on the CPU; arguments as in ``add_mixed``."""
    saves = needs_gradient(x, h, *contexts, weights.row)
    mixed: Tensor = _AddMixed.apply(saves, weights, weights.row, x, h, *contexts)
    return mixed
