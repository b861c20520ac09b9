"""Readout projection, gates and gated sum of the mixers in Numba: one pass forward, one backward.

As in ``feed_forward_native``, each thread takes a few rows at a time through all layers.
"""
# mypy: allow-untyped-defs

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from unimatrix.kernels.passes.gated_sum_native import sigmoid
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
from unimatrix.ops.numba.tiles import TILE, count_spans, sum_spans
from unimatrix.ops.operator import declare_operator


class MixingSizes(NamedTuple):
    """Sizes of the row of weights: the readout's projection, the gates' matrices and biases.

    Attributes:
        width: D, a multiple of the kernels' lanes.
        inner: R, the width of the readout before its projection, likewise a multiple.
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
    x, h, readout, context_1, context_2, weights, panels, saved_gates, saved_projected, y,
):  # fmt: skip
    D, R, W, C = width, inner, len(lanes), num_gates * width
    gates_bias = pointer(weights, D * (R + C))
    out_across = pointer(panels, 0)
    gates_across = at(out_across, D * R)
    scratch = np.empty(0 if len(saved_gates) else TILE * (C + D), x.dtype)
    end = last * num_rows // num_spans
    for start in range(first * num_rows // num_spans, end, TILE):
        rows = min(TILE, end - start)
        source, target = pointer(x, start * D), pointer(y, start * D)
        if len(saved_gates):
            gates, projected = pointer(saved_gates, start * C), pointer(saved_projected, start * D)
        else:
            gates, projected = pointer(scratch, 0), pointer(scratch, TILE * C)
        contexts = (projected, pointer(context_1, start * D), pointer(context_2, start * D))
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
                sums = load(source, row * D + j, lanes)
                for n in range(num_gates):
                    place = row * C + n * D + j
                    bias = load(gates_bias, n * D + j, lanes)
                    logits = plus(load(gates, place, lanes), bias)
                    share = sigmoid(logits, ones)
                    store(gates, place, share)
                    sums = plus(sums, times(share, load(contexts[n], row * D + j, lanes)))
                store(target, row * D + j, sums)
    keep(scratch)


@kernel(**OPTIONS)
def _backward_spans(
    first, last, lanes, num_spans, num_rows, width, inner, num_gates,
    h, readout, context_1, context_2, saved_gates, saved_projected, panels,
    dy, beside_1, beside_2, dh, dreadout, dcontext_1, dcontext_2, grads,
):  # fmt: skip
    """Set the gradients; those of the contexts add ``beside_1`` and ``beside_2``, if not empty."""
    D, R, W, C = width, inner, len(lanes), num_gates * width
    out_panels = pointer(panels, D * (R + C))
    gates_panels = at(out_panels, D * R)
    num_grads = len(grads) // num_spans
    dlogits_row = C + W  # rows no power of two apart
    scratch = np.empty(TILE * (dlogits_row + D), dy.dtype)
    dlogits, dprojected = pointer(scratch, 0), pointer(scratch, TILE * dlogits_row)
    for span in range(first, last):
        grads[span * num_grads : (span + 1) * num_grads] = 0
        dout = pointer(grads, span * num_grads)
        dgates = at(dout, D * R)
        dbias = at(dgates, C * D)
        end = (span + 1) * num_rows // num_spans
        for start in range(span * num_rows // num_spans, end, TILE):
            rows, place = min(TILE, end - start), start * D
            source, grad = pointer(h, place), pointer(dy, place)
            read, gates = pointer(readout, start * R), pointer(saved_gates, start * C)
            projected = pointer(saved_projected, place)
            contexts = (projected, pointer(context_1, place), pointer(context_2, place))
            dcontexts = (dprojected, pointer(dcontext_1, place), pointer(dcontext_2, place))
            beside = (dprojected, pointer(beside_1, place), pointer(beside_2, place))
            for row in range(rows):
                for j in range(0, D, W):
                    dy_j = load(grad, row * D + j, lanes)
                    for n in range(num_gates):
                        column = n * D + j
                        share = load(gates, row * C + column, lanes)
                        dcontext = times(dy_j, share)
                        dlogit = minus(dcontext, times(dcontext, share))
                        dlogit = times(dlogit, load(contexts[n], row * D + j, lanes))
                        if n > 0 and len(beside_1):
                            dcontext = plus(dcontext, load(beside[n], row * D + j, lanes))
                        store(dcontexts[n], row * D + j, dcontext)
                        store(dlogits, row * dlogits_row + column, dlogit)
                        store(dbias, column, plus(load(dbias, column, lanes), dlogit))
            multiply(lanes, dlogits, 1, dlogits_row, source, W, D, dgates, D, C, D, rows, True)
            multiply(
                lanes, dlogits, dlogits_row, 1, gates_panels, C * W, W,
                pointer(dh, place), D, rows, D, C, False,
            )  # fmt: skip
            multiply(lanes, dprojected, 1, D, read, W, R, dout, R, D, R, rows, True)
            multiply(
                lanes, dprojected, D, 1, out_panels, D * W, W,
                pointer(dreadout, start * R), R, rows, R, D, False,
            )  # fmt: skip
    keep(scratch)


def _plan(h: Tensor, row: Tensor, sizes: Sequence[int]) -> tuple[int, int, tuple[int, ...]]:
    """Return spans of rows, work of a span, and sizes of both kernels."""
    num_rows = h.numel() // h.shape[-1]
    num_spans = count_spans(-(-num_rows // TILE))
    work = num_rows * row.numel() // num_spans
    return num_spans, work, (num_spans, num_rows, *sizes)


def run_forward(
    x: Tensor, h: Tensor, readout: Tensor, context_1: Tensor | None, context_2: Tensor | None,
    row: Tensor, panels: Tensor, sizes: Sequence[int], *, saves: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Run the forward kernel; the last three inputs are fields of ``PassWeights``.

    Returns:
        the stream afterwards, and for the backward kernel the gates and the projected readout.
    """
    num_spans, work, counts = _plan(h, row, sizes)
    y, num_saved, width = x.new_empty(x.shape), counts[1] if saves else 0, x.shape[-1]
    gates = x.new_empty(num_saved, sizes[-1] * width)
    projected = x.new_empty(num_saved, width)
    contexts = (_or_other(context_1, h), _or_other(context_2, h))
    inputs = (x, h, readout, *contexts, row, panels)
    run_rows(_apply_spans, LANES, num_spans, work, *counts, *inputs, gates, projected, y)
    return y, gates, projected


def run_backward(
    h: Tensor, readout: Tensor, context_1: Tensor | None, context_2: Tensor | None, gates: Tensor,
    projected: Tensor, row: Tensor, panels: Tensor, sizes: Sequence[int], dy: Tensor, *,
    dcontexts: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Run the backward kernel.

    Args:
        h, readout, context_1, context_2, row, panels, sizes: as in ``run_forward``.
        gates, projected: its last results.
        dy: gradient of the stream.
        dcontexts: gradients of the contexts from their uses beside the pass; empty without any.

    Returns:
        the gradients of h, of the readout, of both contexts (empty where there is none), and of the
        row of weights.
    """
    num_spans, work, counts = _plan(h, row, sizes)
    contexts = (_or_other(context_1, h), _or_other(context_2, h))
    none = h.new_empty(0)
    # Results of an operator that a graph takes are tensors of their own, also where they are empty.
    sources = (h, readout, context_1, context_2)
    grads = [h.new_empty(0 if x is None else x.shape) for x in sources]
    dweights = h.new_empty(num_spans, row.numel())
    beside = [*dcontexts, none, none][:2]
    inputs = (h, readout, *contexts, gates, projected, panels, dy, *beside)
    run_rows(_backward_spans, LANES, num_spans, 3 * work, *counts, *inputs, *grads, dweights)
    dh, dreadout, dcontext_1, dcontext_2 = grads
    return dh, dreadout, dcontext_1, dcontext_2, sum_spans(dweights)


def _or_other(context: Tensor | None, other: Tensor) -> Tensor:
    """Return a context, or a tensor to give the kernels, which read no context there."""
    return other if context is None else context


_add_mixed = declare_operator(
    "add_mixed",
    run_forward,
    backward=run_backward,
    results="y",
    saved="gates projected",
    residual="x",
    gradients="h readout context_1 context_2 row",
    shapes=lambda x, h, readout, one, two, row, panels, sizes: (
        x.new_empty(x.shape),
        x.new_empty(x.numel() // x.shape[-1], sizes[-1] * x.shape[-1]),
        x.new_empty(x.numel() // x.shape[-1], x.shape[-1]),
    ),
    gradient_shapes=lambda h, readout, one, two, gates, projected, row, *_: tuple(
        h.new_empty(0 if x is None else x.shape) for x in (h, readout, one, two, row)
    ),
)


def add_mixed_native(
    x: Tensor, h: Tensor, contexts: Sequence[Tensor], weights: PassWeights
) -> Tensor:
    """Return the stream and the gated sum of the mixers' contexts.

    Equation: E4 (the readout's projection), E11.

    Args:
        x: [..., D].
        h: [..., D], what the gates see.
        contexts: one to three, the readout [..., R] before its projection, then [..., D].
        weights: from ``prepare_mixing``.

    Returns:
        [..., D].
    """
    readout, one, two = [*contexts, None, None][:3]
    mixed: Tensor = _add_mixed(x, h, readout, one, two, *weights[:3])
    return mixed
