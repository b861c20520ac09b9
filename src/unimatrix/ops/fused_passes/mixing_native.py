"""Readout projection, gates and gated sum of the mixers in Numba: one pass forward, one backward.

As in ``feed_forward_native``, a few rows at a time go through all of it.
"""
# mypy: allow-untyped-defs

from collections.abc import Sequence
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from unimatrix.ops.fused_passes.gated_sum_native import squash
from unimatrix.ops.fused_passes.tiles_native import TILE, count_spans, needs_gradient, sum_spans
from unimatrix.ops.lanes_native import OPTIONS, at, load, minus, plus, pointer, store, times, zeros
from unimatrix.ops.products_native import LANES, cut_panels, multiply
from unimatrix.ops.threads import run_rows


class PreparedMixing(NamedTuple):
    """Weights in the order in which the kernels read them, for several passes.

    Attributes:
        out: [D, R], of the readout's projection.
        gates: [G D, D], of the gates of G contexts side by side, the readout's first.
        gates_bias: [G D].
        out_panels, out_across, gates_panels, gates_across: matrices and their transposes from
            ``cut_panels``.
    """

    out: Tensor
    gates: Tensor
    gates_bias: Tensor
    out_panels: Tensor
    out_across: Tensor
    gates_panels: Tensor
    gates_across: Tensor


def prepare_mixing(out: Tensor, gates: Tensor, gates_bias: Tensor) -> PreparedMixing:
    """Reorder weights; D and R are multiples of the kernels' lanes."""
    panels = (cut_panels(matrix) for matrix in (out, out.t(), gates, gates.t()))
    return PreparedMixing(out, gates, gates_bias, *panels)


@numba.njit(cache=True, **OPTIONS)
def _apply_spans(
    first, last, lanes, num_spans, num_rows, width, inner, num_gates,
    x, h, readout, one, two, out_across, gates_across, gates_bias, kept_gates, kept_readout, y,
):  # fmt: skip
    D, R, W, C = width, inner, len(lanes), num_gates * width
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
            lanes, pointer(readout, start * R), R, 1, pointer(out_across, 0), R * W, W,
            projected, D, rows, D, R, False,
        )  # fmt: skip
        multiply(
            lanes, pointer(h, start * D), D, 1, pointer(gates_across, 0), D * W, W,
            gates, C, rows, C, D, False,
        )  # fmt: skip
        ones = plus(zeros(source, lanes), 1.0)
        for row in range(rows):
            for j in range(0, D, W):
                mixed = load(source, row * D + j, lanes)
                for n in range(num_gates):
                    place = row * C + n * D + j
                    logits = plus(
                        load(gates, place, lanes), load(pointer(gates_bias, 0), n * D + j, lanes)
                    )
                    share = squash(logits, ones)
                    store(gates, place, share)
                    mixed = plus(mixed, times(share, load(contexts[n], row * D + j, lanes)))
                store(target, row * D + j, mixed)


@numba.njit(cache=True, **OPTIONS)
def _backward_spans(
    first, last, lanes, num_spans, num_rows, width, inner, num_gates,
    h, readout, one, two, kept_gates, kept_readout, out_panels, gates_panels,
    dy, dh, dreadout, done, dtwo, grads,
):  # fmt: skip
    D, R, W, C = width, inner, len(lanes), num_gates * width
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
            for row in range(rows):
                for j in range(0, D, W):
                    along = load(grad, row * D + j, lanes)
                    for n in range(num_gates):
                        place, here = row * C + n * D + j, n * D + j
                        share = load(gates, place, lanes)
                        let = times(along, share)
                        slope = minus(let, times(let, share))
                        slope = times(slope, load(contexts[n], row * D + j, lanes))
                        store(dcontexts[n], row * D + j, let)
                        store(slopes, row * slopes_row + here, slope)
                        store(dbias, here, plus(load(dbias, here, lanes), slope))
            multiply(lanes, slopes, 1, slopes_row, source, W, D, dgates, D, C, D, rows, True)
            multiply(
                lanes, slopes, slopes_row, 1, pointer(gates_panels, 0), C * W, W,
                pointer(dh, start * D), D, rows, D, C, False,
            )  # fmt: skip
            multiply(lanes, dprojected, 1, D, read, W, R, dout, R, D, R, rows, True)
            multiply(
                lanes, dprojected, D, 1, pointer(out_panels, 0), D * W, W,
                pointer(dreadout, start * R), R, rows, R, D, False,
            )  # fmt: skip


def _plan(h: Tensor, prepared: PreparedMixing) -> tuple[int, int, tuple[int, ...]]:
    """Return spans of rows, the multiply-adds of one, and the kernels' sizes."""
    (width, inner), num_rows = prepared.out.shape, h.numel() // h.shape[-1]
    num_spans = count_spans(-(-num_rows // TILE))
    work = num_rows * (prepared.out.numel() + prepared.gates.numel()) // num_spans
    num_gates = prepared.gates.shape[0] // width
    return num_spans, work, (num_spans, num_rows, width, inner, num_gates)


def run_forward(
    x: Tensor,
    h: Tensor,
    readout: Tensor,
    contexts: Sequence[Tensor],
    prepared: PreparedMixing,
    *,
    saves: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the forward kernel.

    Returns:
        the stream afterwards, and for the backward kernel the gates and the projected readout.
    """
    num_spans, work, sizes = _plan(h, prepared)
    y, num_kept = torch.empty_like(x), sizes[1] if saves else 0
    gates = x.new_empty(num_kept, prepared.gates.shape[0])
    projected = x.new_empty(num_kept, x.shape[-1])
    given = (x, h, readout, *_fill(contexts, h), prepared.out_across, prepared.gates_across)
    results = (gates, projected, y)
    run_rows(_apply_spans, LANES, num_spans, work, *sizes, *given, prepared.gates_bias, *results)
    return y, gates, projected


def run_backward(
    h: Tensor,
    readout: Tensor,
    contexts: Sequence[Tensor],
    kept: Sequence[Tensor],
    prepared: PreparedMixing,
    dy: Tensor,
) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    """Run the backward kernel; ``kept`` are the last results of ``run_forward``.

    Returns:
        the gradients of h, of the readout, of the other contexts, and of the weights in one row.
    """
    num_spans, work, sizes = _plan(h, prepared)
    dh, dreadout = torch.empty_like(h), torch.empty_like(readout)
    dcontexts = [torch.empty_like(context) for context in contexts]
    num_grads = prepared.out.numel() + prepared.gates.numel() + prepared.gates_bias.numel()
    grads = h.new_empty(num_spans, num_grads)
    given = (h, readout, *_fill(contexts, h), *kept, prepared.out_panels, prepared.gates_panels)
    results = (dy.contiguous(), dh, dreadout, *_fill(dcontexts, dh), grads)
    run_rows(_backward_spans, LANES, num_spans, 3 * work, *sizes, *given, *results)
    return dh, dreadout, dcontexts, sum_spans(grads)


def _fill(contexts: Sequence[Tensor], other: Tensor) -> list[Tensor]:
    """Return two contexts, ``other`` where there is none: the kernels take as many."""
    return [*contexts, other, other][:2]


def split_gradients(row: Tensor, prepared: PreparedMixing) -> list[Tensor]:
    """Return what ``run_backward`` says of each of the weights."""
    weights = prepared[:3]
    grads = row.split([weight.numel() for weight in weights])
    return [grad.view_as(weight) for grad, weight in zip(grads, weights, strict=True)]


class _AddMixed(torch.autograd.Function):
    """The pass with its backward kernel; not differentiable twice."""

    @staticmethod
    def forward(
        ctx: Any,
        saves: bool,
        panels: tuple[Tensor, ...],
        out: Tensor,
        gates: Tensor,
        gates_bias: Tensor,
        *streams: Tensor,
    ) -> Tensor:
        prepared = PreparedMixing(out, gates, gates_bias, *panels)
        x, h, readout, *contexts = (stream.contiguous() for stream in streams)
        y, *kept = run_forward(x, h, readout, contexts, prepared, saves=saves)
        ctx.save_for_backward(*prepared, *kept, h, readout, *contexts)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        given = ctx.saved_tensors
        prepared, kept, (h, readout, *contexts) = PreparedMixing(*given[:7]), given[7:9], given[9:]
        dh, dreadout, dcontexts, row = run_backward(h, readout, contexts, kept, prepared, dy)
        return None, None, *split_gradients(row, prepared), dy, dh, dreadout, *dcontexts


def add_mixed_native(
    x: Tensor, h: Tensor, contexts: Sequence[Tensor], prepared: PreparedMixing
) -> Tensor:
    """Run the pass on the CPU; arguments as in ``add_mixed``."""
    saves = needs_gradient(x, h, *contexts, *prepared[:3])
    y: Tensor = _AddMixed.apply(saves, prepared[3:], *prepared[:3], x, h, *contexts)
    return y
