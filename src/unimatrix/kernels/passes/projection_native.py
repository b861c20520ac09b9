"""Norm, short convolution and projections of a mixer in Numba: one pass forward, one backward.

As in ``feed_forward_native``, each thread takes a few rows at a time through all layers. These rows
are of one sequence; the few tokens before them, which the convolution reads, are normalised again.
"""
# mypy: allow-untyped-defs

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from unimatrix.kernels.passes.weights import PassWeights, hold_float, join_weights, order_panels
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


class _ProjectionForm(NamedTuple):
    """Options of the kernels as tuples, since Numba compiles a kernel for their lengths."""

    lanes: tuple[int, ...]
    centred: tuple[int, ...]  # empty: the norm is RMSNorm
    squashed: tuple[int, ...]  # empty: the vectors do not pass through tanh


class ProjectionSizes(NamedTuple):
    """Sizes of the row of weights: scale, shift, filters, vectors, controls and their bias.

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
    """Normalise a tile, and again the tokens before the tile that its convolution reads.

    Args:
        x: the sequence's first row.
        recent: rows before the sequence.
        start: the tile's first token.
        units, h: set to ``num_taps - 1`` rows and then the tile's. Behind the rows of ``units`` the
            inverse norms are written, from the first row that was normalised on.
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
def _convolve(lanes, h, filters, num_taps, rows, width, mixed):
    """Set ``mixed`` to a tile's rows convolved; in h, ``num_taps - 1`` rows come before them."""
    for row in range(rows):
        for j in range(0, width, len(lanes)):
            sums = zeros(mixed, lanes)
            for k in range(num_taps):
                h_j = load(h, (row + k) * width + j, lanes)
                sums = plus(sums, times(h_j, load(filters, k * width + j, lanes)))
            store(mixed, row * width + j, sums)


@part(**OPTIONS)
def _convolve_backward(lanes, h, filters, num_taps, rows, known_rows, width, dmixed, dh, dfilters):
    """Add a convolution's gradients to ``dh`` of a tile's rows and to ``dfilters``.

    Args:
        h: ``num_taps - 1`` rows, then the tile's.
        known_rows: rows of ``dmixed``: the tile's, and those behind it that read the tile.
    """
    for k in range(num_taps):
        delay = num_taps - 1 - k  # rows from one to the output in which this tap reads it
        for j in range(0, width, len(lanes)):
            tap = load(filters, k * width + j, lanes)
            sums = load(dfilters, k * width + j, lanes)
            for i in range(rows):
                h_j = load(h, (i + k) * width + j, lanes)
                sums = plus(sums, times(load(dmixed, i * width + j, lanes), h_j))
                if i + delay < known_rows:
                    product = times(load(dmixed, (i + delay) * width + j, lanes), tap)
                    store(dh, i * width + j, plus(load(dh, i * width + j, lanes), product))
            store(dfilters, k * width + j, sums)


@part(**OPTIONS)
def _recent_backward(lanes, filters, num_taps, known_rows, width, dmixed, drecent):
    """Set the gradient of the rows before a sequence from that of the first convolved rows."""
    for i in range(max(num_taps - 1, 0)):
        for j in range(0, width, len(lanes)):
            sums = zeros(drecent, lanes)
            for k in range(min(i + 1, num_taps)):
                if i - k < known_rows:
                    tap = load(filters, k * width + j, lanes)
                    sums = plus(sums, times(load(dmixed, (i - k) * width + j, lanes), tap))
            store(drecent, i * width + j, sums)


@part(**OPTIONS)
def _apply_tanh(lanes, vectors, count):
    """Replace numbers by their tanh, exact to the last bits of 1."""
    for j in range(0, count, len(lanes)):
        x = load(vectors, j, lanes)
        power = exponential(times(where_negative(x, x, times(x, -1.0)), 2.0))
        ones = plus(zeros(vectors, lanes), 1.0)
        size = over(minus(ones, power), plus(ones, power))
        store(vectors, j, where_negative(x, times(size, -1.0), size))


@part(**OPTIONS)
def _apply_tanh_backward(lanes, dy, y, dx, count):
    """Set ``dx`` to the gradient before the tanh."""
    for j in range(0, count, len(lanes)):
        y_j = load(y, j, lanes)
        slope = minus(plus(zeros(dx, lanes), 1.0), times(y_j, y_j))
        store(dx, j, times(load(dy, j, lanes), slope))


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
    tiles_per_row = (num_tokens + TILE - 1) // TILE
    num_tiles = len(x) // (num_tokens * D) * tiles_per_row
    stride = len(vectors) // (len(x) // D)
    num_around = (num_before + TILE) * (D + 1)
    scratch = np.empty(2 * num_around + TILE * (D + padded), x.dtype)
    units, around = pointer(scratch, 0), pointer(scratch, num_around)
    mixed = at(around, num_around)
    logits = at(mixed, TILE * D)
    for tile in range(first * num_tiles // num_spans, last * num_tiles // num_spans):
        row, part = tile // tiles_per_row, tile % tiles_per_row
        start = part * num_tokens // tiles_per_row
        rows = (part + 1) * num_tokens // tiles_per_row - start
        position = row * num_tokens + start
        _normalize_around(
            form, pointer(x, row * num_tokens * D), pointer(recent, row * num_before * D),
            num_taps, start, rows, D, eps[0], scale, shift, units, around,
        )  # fmt: skip
        source = at(around, num_before * D)
        copy_rows(lanes, source, pointer(h, position * D), rows * D)
        multiply(
            lanes, source, D, 1, controls_across, D * W, W,
            logits, padded, rows, padded, D, False,
        )  # fmt: skip
        for i in range(rows):
            for j in range(C):
                controls[(position + i) * C + j] = logits[i * padded + j] + controls_bias[j]
        if num_taps:
            _convolve(lanes, around, filters, num_taps, rows, D, mixed)
            source = mixed
        multiply(
            lanes, source, D, 1, vectors_across, D * W, W,
            pointer(vectors, position * stride), stride, rows, V, D, False,
        )  # fmt: skip
        if len(form.squashed):
            for i in range(rows):
                _apply_tanh(lanes, pointer(vectors, (position + i) * stride), V)
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
    tiles_per_row = (num_tokens + TILE - 1) // TILE
    num_tiles = len(x) // (num_tokens * D) * tiles_per_row
    stride = len(vectors) // (len(x) // D)
    num_grads = len(grads) // num_spans
    num_around = (num_before + TILE) * (D + 1)
    # Rows a power of two apart cost cache in products: copies of them are wider.
    dsource_row = V + W
    scratch = np.empty(3 * num_around + 2 * TILE * D + (num_before + TILE) * dsource_row, x.dtype)
    units, around = pointer(scratch, 0), pointer(scratch, num_around)
    dmixed = pointer(scratch, 2 * num_around)
    mixed = at(dmixed, num_around)
    dnormed = at(mixed, TILE * D)
    copied = at(dnormed, TILE * D)
    inverses = at(units, (num_before + TILE) * D)
    for span in range(first, last):
        grads[span * num_grads : (span + 1) * num_grads] = 0
        dscale = pointer(grads, span * num_grads)
        dshift, dfilters = at(dscale, D), at(dscale, num_norms * D)
        dvector_weights = at(dfilters, num_taps * D)
        dcontrol_weights = at(dvector_weights, V * D)
        dbias = at(dcontrol_weights, C * D)
        for tile in range(span * num_tiles // num_spans, (span + 1) * num_tiles // num_spans):
            row, part = tile // tiles_per_row, tile % tiles_per_row
            start = part * num_tokens // tiles_per_row
            rows = (part + 1) * num_tokens // tiles_per_row - start
            position = row * num_tokens + start
            _normalize_around(
                form, pointer(x, row * num_tokens * D), pointer(recent, row * num_before * D),
                num_taps, start, rows, D, eps[0], scale, shift, units, around,
            )  # fmt: skip
            normed = at(around, num_before * D)
            source = normed
            if num_taps:
                _convolve(lanes, around, filters, num_taps, rows, D, mixed)
                source = mixed
            # The gradient also of the tokens behind the tile whose convolutions read the tile.
            known_rows = min(rows + num_before, num_tokens - start)
            dsource, dsource_stride = pointer(dvectors, position * stride), stride
            if len(form.squashed) or stride == V:
                dsource, dsource_stride = copied, dsource_row
                for i in range(known_rows):
                    place, target = (position + i) * stride, at(copied, i * dsource_row)
                    grad = pointer(dvectors, place)
                    if len(form.squashed):
                        _apply_tanh_backward(lanes, grad, pointer(vectors, place), target, V)
                    else:
                        copy_rows(lanes, grad, target, V)
            logits = pointer(dcontrols, position * C)
            multiply(
                lanes, dsource, dsource_stride, 1, vectors_panels, V * W, W,
                dmixed, D, known_rows, D, V, False,
            )  # fmt: skip
            multiply(
                lanes, dsource, 1, dsource_stride, source, W, D,
                dvector_weights, D, V, D, rows, True,
            )  # fmt: skip
            multiply(lanes, logits, 1, C, normed, W, D, dcontrol_weights, D, C, D, rows, True)
            for i in range(rows):
                for j in range(C):
                    dbias[j] += logits[i * C + j]
            copy_rows(lanes, pointer(dh, position * D), dnormed, rows * D)
            multiply(
                lanes, logits, C, 1, controls_panels, C * W, W,
                dnormed, D, rows, D, C, True,
            )  # fmt: skip
            if num_taps == 0:
                for j in range(0, rows * D, W):
                    store(dnormed, j, plus(load(dnormed, j, lanes), load(dmixed, j, lanes)))
            _convolve_backward(
                lanes, around, filters, num_taps, rows, known_rows, D, dmixed, dnormed, dfilters,
            )  # fmt: skip
            if start == 0:
                before = pointer(drecent, row * num_before * D)
                _recent_backward(lanes, filters, num_taps, known_rows, D, dmixed, before)
            target = pointer(dx, position * D)
            if len(dstream):
                copy_rows(lanes, pointer(dstream, position * D), target, rows * D)
            else:
                for j in range(0, rows * D, W):
                    store(target, j, zeros(target, lanes))
            normalize_tile_backward(
                form, dnormed, at(units, num_before * D), at(inverses, min(num_before, start)),
                rows, D, scale, target, dscale, dshift,
            )  # fmt: skip
    keep(scratch)


def _plan(
    x: Tensor, row: Tensor, panels: Tensor, sizes: Sequence[int], eps: float, squashes: bool
) -> tuple[_ProjectionForm, int, int, tuple[int, ...], tuple[Any, ...]]:
    """Return form, spans of rows, work of a span, sizes and weights of both kernels."""
    B, T, D = x.shape
    *counts, is_centred = ProjectionSizes(*sizes)
    form = _ProjectionForm(LANES, (0,) * is_centred, (0,) * squashes)
    num_spans = count_spans(B * -(-T // TILE))
    work = B * T * D * (sizes[1] + sizes[2]) // num_spans
    return form, num_spans, work, (num_spans, T, *counts), (hold_float(eps, x.dtype), row, panels)


def run_forward(
    x: Tensor, recent: Tensor | None, row: Tensor, panels: Tensor, sizes: Sequence[int], eps: float,
    squashes: bool, *, spare: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Run the forward kernel.

    Args:
        x, recent, squashes: as in ``project_native``.
        row, panels, sizes, eps: fields of ``PassWeights``.
        spare: unused numbers behind the vectors of each token: rows a power of two apart cost
            cache.

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
        dstream: gradient of x from its uses beside the pass; ``None`` without any.

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
