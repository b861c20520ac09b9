"""Norm, short convolution and projections of a mixer in Numba: one pass forward, one backward.

As in ``feed_forward_native``, a few rows at a time go through all of it. A tile lies in one
sequence and normalises the few tokens before it once more, as the convolution sees them.
"""
# mypy: allow-untyped-defs

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from unimatrix.kernels.passes.weights import (
    PassWeights,
    hold_float,
    join_weights,
    order_panels,
)
from unimatrix.ops.numba.compile import kernel, part
from unimatrix.ops.numba.lanes import (
    OPTIONS,
    at,
    exponential,
    keep,
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
from unimatrix.ops.numba.products import LANES, multiply
from unimatrix.ops.numba.threads import run_rows
from unimatrix.ops.numba.tiles import (
    TILE,
    copy_rows,
    count_spans,
    normalize_tile,
    normalize_tile_backward,
    sum_spans,
)
from unimatrix.ops.operator import declare_operator


class _Form(NamedTuple):
    """What a kernel is compiled for, as tuples: their lengths are part of the Numba type."""

    lanes: tuple[int, ...]
    centred: tuple[int, ...]  # empty: the norm is RMSNorm
    squashed: tuple[int, ...]  # empty: the vectors do not pass through tanh


class ProjectionSizes(NamedTuple):
    """What the row of weights holds: scale, shift, filters, vectors, controls and their bias.

    Attributes:
        width: D.
        columns: V, a multiple of the kernels' lanes.
        num_controls: C.
        num_taps: K, 0 without a convolution.
        is_centred: 1 if the norm is LayerNorm, which has a shift.
    """

    width: int
    columns: int
    num_controls: int
    num_taps: int
    is_centred: int


def prepare_projections(
    scale: Tensor, shift: Tensor | None, eps: float, filters: Tensor | None,
    vectors: Sequence[Tensor], controls: Sequence[Tensor], controls_bias: Sequence[Tensor],
) -> PassWeights:  # fmt: skip
    """Join the weights of norm, convolution and projections.

    Args:
        scale, shift, eps: [D] each, of the norm; no shift is RMSNorm.
        filters: [K, D], of the convolution, the current token's last; ``None`` is none.
        vectors: [.., D] each, V together, a multiple of the kernels' lanes as D is; they see the
            convolution.
        controls, controls_bias: [.., D] and [..] each, C together; they do not.
    """
    width, columns = scale.numel(), sum(matrix.shape[0] for matrix in vectors)
    num_controls = sum(matrix.shape[0] for matrix in controls)
    num_taps = 0 if filters is None else filters.shape[0]
    sizes = ProjectionSizes(width, columns, num_controls, num_taps, int(shift is not None))
    first = width * (1 + sizes.is_centred + num_taps)
    order = order_panels(((first, columns, width), (first + columns * width, num_controls, width)))
    others = [weight for weight in (scale, shift, filters) if weight is not None]
    return join_weights([*others, *vectors, *controls, *controls_bias], order, sizes, eps)


@part(**OPTIONS)
def _normalize_around(form, x, recent, num_taps, start, rows, width, eps, scale, shift, units, h):
    """Normalise a tile and the tokens before it that a convolution sees.

    Args:
        x: the sequence's first row.
        recent: rows before it.
        start: the tile's first token.
        units, h: room for ``num_taps - 1`` rows and then the tile's; behind the room in ``units``
            come the divisors' inverses, of the first row that was normalised on.
    """
    num_before = max(num_taps - 1, 0)
    for i in range(num_before):
        t = start - num_before + i
        if t < 0:
            copy_rows(form.lanes, at(recent, (num_before + t) * width), at(h, i * width), width)
    earlier = min(num_before, start)
    first = num_before - earlier
    inverses = at(units, (num_before + TILE) * width)
    normalize_tile(
        form, at(x, (start - earlier) * width), rows + earlier, width, eps, scale, shift,
        at(units, first * width), at(h, first * width), width, inverses,
    )  # fmt: skip


@part(**OPTIONS)
def _convolve(lanes, h, filters, num_taps, rows, width, source):
    """Set ``source`` to the tile's rows of h, behind ``num_taps - 1`` others, convolved."""
    for row in range(rows):
        for j in range(0, width, len(lanes)):
            mixed = zeros(source, lanes)
            for k in range(num_taps):
                part = load(h, (row + k) * width + j, lanes)
                mixed = plus(mixed, times(part, load(filters, k * width + j, lanes)))
            store(source, row * width + j, mixed)


@part(**OPTIONS)
def _squash(lanes, vectors, count):
    """Replace numbers by their tanh, exact to the last bits of 1."""
    for j in range(0, count, len(lanes)):
        x = load(vectors, j, lanes)
        fading = exponential(times(where_negative(x, x, times(x, -1.0)), 2.0))
        ones = plus(zeros(vectors, lanes), 1.0)
        size = over(minus(ones, fading), plus(ones, fading))
        store(vectors, j, where_negative(x, times(size, -1.0), size))


@part(**OPTIONS)
def _squash_backward(lanes, along, made, target, count):
    """Set ``target`` to the gradient before the tanh that made ``made``."""
    for j in range(0, count, len(lanes)):
        value = load(made, j, lanes)
        slope = minus(plus(zeros(target, lanes), 1.0), times(value, value))
        store(target, j, times(load(along, j, lanes), slope))


@kernel(**OPTIONS)
def _apply_spans(
    first, last, form, num_spans, num_tokens, width, columns, num_controls, num_taps,
    x, recent, eps, weights, panels, h, vectors, controls,
):  # fmt: skip
    lanes, D, V, C, W = form.lanes, width, columns, num_controls, len(form.lanes)
    padded = (C + W - 1) // W * W
    scale = pointer(weights, 0)
    shift = at(scale, D)
    filters = at(scale, D * (1 + len(form.centred)))
    controls_bias = at(filters, D * (num_taps + V + C))
    vectors_across = pointer(panels, 0)
    controls_across = at(vectors_across, V * D)
    num_before = max(num_taps - 1, 0)
    per_row = (num_tokens + TILE - 1) // TILE
    num_tiles = len(x) // (num_tokens * D) * per_row
    stride = len(vectors) // (len(x) // D)
    room = (num_before + TILE) * (D + 1)
    scratch = np.empty(2 * room + TILE * (D + padded), x.dtype)
    units, around = pointer(scratch, 0), pointer(scratch, room)
    mixed = at(around, room)
    logits = at(mixed, TILE * D)
    for tile in range(first * num_tiles // num_spans, last * num_tiles // num_spans):
        row, part = tile // per_row, tile % per_row
        start = part * num_tokens // per_row
        rows = (part + 1) * num_tokens // per_row - start
        position = row * num_tokens + start
        _normalize_around(
            form, pointer(x, row * num_tokens * D), pointer(recent, row * num_before * D),
            num_taps, start, rows, D, eps[0], scale, shift, units, around,
        )  # fmt: skip
        here = at(around, num_before * D)
        copy_rows(lanes, here, pointer(h, position * D), rows * D)
        multiply(
            lanes, here, D, 1, controls_across, D * W, W,
            logits, padded, rows, padded, D, False,
        )  # fmt: skip
        for i in range(rows):
            for j in range(C):
                controls[(position + i) * C + j] = logits[i * padded + j] + controls_bias[j]
        if num_taps:
            _convolve(lanes, around, filters, num_taps, rows, D, mixed)
            here = mixed
        multiply(
            lanes, here, D, 1, vectors_across, D * W, W,
            pointer(vectors, position * stride), stride, rows, V, D, False,
        )  # fmt: skip
        if len(form.squashed):
            for i in range(rows):
                _squash(lanes, pointer(vectors, (position + i) * stride), V)
    keep(scratch)


@kernel(**OPTIONS)
def _backward_spans(
    first, last, form, num_spans, num_tokens, width, columns, num_controls, num_taps,
    x, recent, eps, weights, panels, vectors, dstream, dh, dvectors, dcontrols,
    dx, drecent, grads,
):  # fmt: skip
    lanes, D, V, C, W = form.lanes, width, columns, num_controls, len(form.lanes)
    padded, num_norms = (C + W - 1) // W * W, 1 + len(form.centred)
    scale = pointer(weights, 0)
    shift = at(scale, D)
    filters = at(scale, D * num_norms)
    vectors_panels = pointer(panels, D * (V + padded))
    controls_panels = at(vectors_panels, V * D)
    num_before = max(num_taps - 1, 0)
    per_row = (num_tokens + TILE - 1) // TILE
    num_tiles = len(x) // (num_tokens * D) * per_row
    stride = len(vectors) // (len(x) // D)
    num_grads = len(grads) // num_spans
    room = (num_before + TILE) * (D + 1)
    # Products along rows that lie a power of two apart cost cache; such are copied.
    scratch = np.empty(3 * room + 2 * TILE * D + (num_before + TILE) * (V + W), x.dtype)
    units, around, dmixed = pointer(scratch, 0), pointer(scratch, room), pointer(scratch, 2 * room)
    mixed, within = at(dmixed, room), at(dmixed, room + TILE * D)
    inverses = at(units, (num_before + TILE) * D)
    for span in range(first, last):
        grads[span * num_grads : (span + 1) * num_grads] = 0
        dscale = pointer(grads, span * num_grads)
        dshift, dfilters = at(dscale, D), at(dscale, num_norms * D)
        by_vectors = at(dfilters, num_taps * D)
        by_controls = at(by_vectors, V * D)
        by_bias = at(by_controls, C * D)
        for tile in range(span * num_tiles // num_spans, (span + 1) * num_tiles // num_spans):
            row, part = tile // per_row, tile % per_row
            start = part * num_tokens // per_row
            rows = (part + 1) * num_tokens // per_row - start
            position = row * num_tokens + start
            _normalize_around(
                form, pointer(x, row * num_tokens * D), pointer(recent, row * num_before * D),
                num_taps, start, rows, D, eps[0], scale, shift, units, around,
            )  # fmt: skip
            here = at(around, num_before * D)
            source = here
            if num_taps:
                _convolve(lanes, around, filters, num_taps, rows, D, mixed)
                source = mixed
            # Of the tokens behind the tile too, whose convolutions see it.
            reached = min(rows + num_before, num_tokens - start)
            by, by_row = pointer(dvectors, position * stride), stride
            if len(form.squashed) or stride == V:
                by, by_row = at(within, TILE * D), V + W
                for i in range(reached):
                    place, target = (position + i) * stride, at(by, i * by_row)
                    along, made = pointer(dvectors, place), pointer(vectors, place)
                    if len(form.squashed):
                        _squash_backward(lanes, along, made, target, V)
                    else:
                        copy_rows(lanes, along, target, V)
            logits = pointer(dcontrols, position * C)
            multiply(
                lanes, by, by_row, 1, vectors_panels, V * W, W,
                dmixed, D, reached, D, V, False,
            )  # fmt: skip
            multiply(lanes, by, 1, by_row, source, W, D, by_vectors, D, V, D, rows, True)
            multiply(lanes, logits, 1, C, here, W, D, by_controls, D, C, D, rows, True)
            for i in range(rows):
                for j in range(C):
                    by_bias[j] += logits[i * C + j]
            copy_rows(lanes, pointer(dh, position * D), within, rows * D)
            multiply(
                lanes, logits, C, 1, controls_panels, C * W, W,
                within, D, rows, D, C, True,
            )  # fmt: skip
            if num_taps == 0:
                for j in range(0, rows * D, W):
                    store(within, j, plus(load(within, j, lanes), load(dmixed, j, lanes)))
            for k in range(num_taps):
                behind = num_before - k  # tokens until the filter sees a row
                for j in range(0, D, W):
                    tap, sums = (
                        load(filters, k * D + j, lanes),
                        load(dfilters, k * D + j, lanes),
                    )
                    for i in range(rows):
                        seen = load(around, (i + k) * D + j, lanes)
                        sums = plus(sums, times(load(dmixed, i * D + j, lanes), seen))
                        if i + behind < reached:
                            place = i * D + j
                            along = times(load(dmixed, (i + behind) * D + j, lanes), tap)
                            store(within, place, plus(load(within, place, lanes), along))
                    store(dfilters, k * D + j, sums)
            if start == 0:
                before = pointer(drecent, row * num_before * D)
                for i in range(num_before):
                    for j in range(0, D, W):
                        sums = zeros(before, lanes)
                        for k in range(min(i + 1, num_taps)):
                            if i - k < reached:
                                tap = load(filters, k * D + j, lanes)
                                sums = plus(sums, times(load(dmixed, (i - k) * D + j, lanes), tap))
                        store(before, i * D + j, sums)
            target = pointer(dx, position * D)
            if len(dstream):
                copy_rows(lanes, pointer(dstream, position * D), target, rows * D)
            else:
                for j in range(0, rows * D, W):
                    store(target, j, zeros(target, lanes))
            normalize_tile_backward(
                form, within, at(units, num_before * D), at(inverses, min(num_before, start)),
                rows, D, scale, target, dscale, dshift,
            )  # fmt: skip
    keep(scratch)


def _plan(
    x: Tensor, row: Tensor, panels: Tensor, sizes: Sequence[int], eps: float, squashes: bool
) -> tuple[_Form, int, int, tuple[int, ...], tuple[Any, ...]]:
    """Return the kernels' form, spans of rows, the work of one, sizes, and the weights."""
    B, T, D = x.shape
    *counts, is_centred = ProjectionSizes(*sizes)
    form = _Form(LANES, (0,) * is_centred, (0,) * squashes)
    num_spans = count_spans(B * -(-T // TILE))
    work = B * T * D * (sizes[1] + sizes[2]) // num_spans
    return form, num_spans, work, (num_spans, T, *counts), (hold_float(eps, x.dtype), row, panels)


def run_forward(
    x: Tensor, recent: Tensor | None, row: Tensor, panels: Tensor, sizes: Sequence[int], eps: float,
    squashes: bool, *, spare: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Run the forward kernel.

    Args:
        x, recent, squashes: as in ``project``.
        row, panels, sizes, eps: fields of ``PassWeights``.
        spare: numbers behind the vectors of each token, so that they lie no power of two apart.

    Returns:
        h, vectors and controls, [B, T, D or V + spare or C].
    """
    form, num_spans, work, counts, weights = _plan(x, row, panels, sizes, eps, squashes)
    _, columns, num_controls, num_taps, _ = sizes
    h = x.new_empty(x.shape)
    vectors = x.new_empty(*x.shape[:2], columns + spare)
    controls = x.new_empty(*x.shape[:2], num_controls)
    inputs = (x, _or_zeros(recent, x, num_taps), *weights)
    run_rows(_apply_spans, form, num_spans, work, *counts, *inputs, h, vectors, controls)
    return h, vectors, controls


def run_backward(
    x: Tensor, recent: Tensor | None, row: Tensor, panels: Tensor, vectors: Tensor,
    sizes: Sequence[int], eps: float, squashes: bool, dh: Tensor, dvectors: Tensor,
    dcontrols: Tensor, *, dstream: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Run the backward kernel.

    Args:
        x, recent, row, panels, sizes, eps, squashes: as in ``run_forward``.
        vectors: from there.
        dh, dvectors, dcontrols: gradients of the results, in their shapes.
        dstream: the gradient of x from where the stream goes on beside the pass; ``None`` if it is
            added elsewhere.

    Returns:
        the gradients of x, of ``recent``, and of the row of weights.
    """
    form, num_spans, work, counts, weights = _plan(x, row, panels, sizes, eps, squashes)
    before = _or_zeros(recent, x, sizes[3])
    dx, drecent = x.new_empty(x.shape), x.new_empty(before.shape)
    dweights = x.new_empty(num_spans, row.numel())
    stream = x.new_empty(0) if dstream is None else dstream
    inputs = (x, before, *weights, vectors, stream, dh, dvectors, dcontrols)
    outputs = (dx, drecent, dweights)
    run_rows(_backward_spans, form, num_spans, 3 * work, *counts, *inputs, *outputs)
    return dx, drecent if recent is None else drecent.to(recent.dtype), sum_spans(dweights)


def _or_zeros(recent: Tensor | None, x: Tensor, num_taps: int) -> Tensor:
    """Return the rows before a sequence, contiguous."""
    if recent is not None:
        return recent.to(x.dtype).contiguous()
    return x.new_zeros(x.shape[0], max(num_taps - 1, 0), x.shape[2])


_project = declare_operator(
    "project",
    run_forward,
    backward=run_backward,
    results="h vectors controls",
    gradients="x recent row",
    shapes=lambda x, recent, row, panels, sizes, *_: (
        x.new_empty(x.shape),
        *(x.new_empty(*x.shape[:2], columns) for columns in sizes[1:3]),
    ),
    gradient_shapes=lambda x, recent, row, panels, vectors, sizes, *_: (
        x.new_empty(x.shape),
        (x if recent is None else recent).new_empty(x.shape[0], max(sizes[3] - 1, 0), x.shape[2]),
        row.new_empty(row.shape),
    ),
)


def project_native(
    x: Tensor, recent: Tensor | None, weights: PassWeights, *, squashes: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise the stream, convolve, and apply a mixer's projections.

    Equation: E19, E22; E24 with tanh.

    Args:
        x: [B, T, D].
        recent: [B, K - 1, D], normalised streams of the tokens before; ``None`` is zeros.
        weights: from ``prepare_projections``.
        squashes: whether the vectors pass through tanh.

    Returns:
        the normalised stream, the vectors and the controls, [B, T, D or V or C].
    """
    h, vectors, controls = _project(x, recent, *weights, squashes)
    return h, vectors, controls
