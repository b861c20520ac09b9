"""The short convolution in Numba: one pass forward, one backward."""
# mypy: allow-untyped-defs

import numpy as np
from torch import Tensor

from unimatrix.ops.numba.compile import kernel, part
from unimatrix.ops.numba.lanes import OPTIONS, load, plus, pointer, store, times
from unimatrix.ops.numba.threads import run_rows
from unimatrix.ops.operator import declare_operator

_FORM = ((0,) * 16, (0,))
"""Lanes, and the single lane of what is left at a row's end."""
_BLOCK = 64
"""Tokens that share one sum for the filters' gradient."""


@part(**OPTIONS)
def _copy(source, target, num_numbers):
    for j in range(num_numbers):
        target[j] = source[j]


@part(**OPTIONS)
def _find_window(b, t, num_tokens, num_taps, width, h, recent, edge):
    """Return where the K tokens of row b up to token t lie side by side.

    Those before the sequence's first token lie in ``recent``, so near the start all are copied to
    ``edge``.
    """
    first = t - num_taps + 1
    if first >= 0:
        return pointer(h, (b * num_tokens + first) * width)
    before = pointer(recent, (b * (num_taps - 1) + t) * width)
    _copy(before, pointer(edge, 0), -first * width)
    _copy(pointer(h, b * num_tokens * width), pointer(edge, -first * width), (t + 1) * width)
    return pointer(edge, 0)


@part(**OPTIONS)
def _find_outputs(b, t, num_tokens, num_taps, width, dy, edge):
    """Return where the gradients of the K outputs from token t on lie side by side.

    Where some of these tokens do not exist, all are copied to ``edge``, with zeros for the missing.
    """
    last = t + num_taps - 1
    if t >= 0 and last < num_tokens:
        return pointer(dy, (b * num_tokens + t) * width)
    for token in range(t, last + 1):
        target = pointer(edge, (token - t) * width)
        if 0 <= token < num_tokens:
            _copy(pointer(dy, (b * num_tokens + token) * width), target, width)
        else:
            for j in range(width):
                target[j] = 0
    return pointer(edge, 0)


@part(**OPTIONS)
def _mix_lanes(lanes, j, num_taps, width, window, weight, target):
    mixed = times(load(window, j, lanes), load(weight, j, lanes))
    for at in range(width + j, num_taps * width, width):
        mixed = plus(mixed, times(load(window, at, lanes), load(weight, at, lanes)))
    store(target, j, mixed)


@part(**OPTIONS)
def _gather_lanes(lanes, j, num_taps, width, outputs, weight, target):
    """Set a token's gradient from those of its K outputs, which saw it with taps in turn."""
    last = (num_taps - 1) * width + j
    sums = times(load(outputs, j, lanes), load(weight, last, lanes))
    for back in range(width, num_taps * width, width):
        product = times(load(outputs, back + j, lanes), load(weight, last - back, lanes))
        sums = plus(sums, product)
    store(target, j, sums)


@part(**OPTIONS)
def _add_filter_lanes(lanes, j, num_taps, width, window, dy, dfilters):
    """Add one output's share to the gradient of the filters."""
    dy_j = load(dy, j, lanes)
    for at in range(j, num_taps * width, width):
        product = times(dy_j, load(window, at, lanes))
        store(dfilters, at, plus(load(dfilters, at, lanes), product))


@kernel(**OPTIONS)
def _mix_blocks(first, last, form, num_tokens, num_taps, width, h, weight, recent, y):
    lanes, one_lane = form
    even = width - width % len(lanes)
    blocks_per_row = -(-num_tokens // _BLOCK)
    filters, edge = pointer(weight, 0), np.empty(num_taps * width, y.dtype)
    for block in range(first, last):
        b, start = block // blocks_per_row, block % blocks_per_row * _BLOCK
        for t in range(start, min(start + _BLOCK, num_tokens)):
            window = _find_window(b, t, num_tokens, num_taps, width, h, recent, edge)
            target = pointer(y, (b * num_tokens + t) * width)
            for j in range(0, even, len(lanes)):
                _mix_lanes(lanes, j, num_taps, width, window, filters, target)
            for j in range(even, width):
                _mix_lanes(one_lane, j, num_taps, width, window, filters, target)


@kernel(**OPTIONS)
def _backward_blocks(
    first, last, form, num_tokens, num_taps, width, h, weight, recent, dy, dh, dweight, drecent
):  # fmt: skip
    lanes, one_lane = form
    even = width - width % len(lanes)
    blocks_per_row = -(-num_tokens // _BLOCK)
    filters, edge = pointer(weight, 0), np.empty(num_taps * width, dh.dtype)
    for block in range(first, last):
        b, start = block // blocks_per_row, block % blocks_per_row * _BLOCK
        dfilters = pointer(dweight, block * num_taps * width)
        for j in range(num_taps * width):
            dfilters[j] = 0
        for t in range(start if start else 1 - num_taps, min(start + _BLOCK, num_tokens)):
            outputs = _find_outputs(b, t, num_tokens, num_taps, width, dy, edge)
            target = pointer(drecent, ((b + 1) * (num_taps - 1) + t) * width)
            if t >= 0:
                target = pointer(dh, (b * num_tokens + t) * width)
            for j in range(0, even, len(lanes)):
                _gather_lanes(lanes, j, num_taps, width, outputs, filters, target)
            for j in range(even, width):
                _gather_lanes(one_lane, j, num_taps, width, outputs, filters, target)
            if t < 0:
                continue
            window = _find_window(b, t, num_tokens, num_taps, width, h, recent, edge)
            grad = pointer(dy, (b * num_tokens + t) * width)
            for j in range(0, even, len(lanes)):
                _add_filter_lanes(lanes, j, num_taps, width, window, grad, dfilters)
            for j in range(even, width):
                _add_filter_lanes(one_lane, j, num_taps, width, window, grad, dfilters)


def _run_forward(h: Tensor, weight: Tensor, recent: Tensor) -> Tensor:
    (B, T, D), K, y = h.shape, weight.shape[0], h.new_empty(h.shape)
    inputs = (T, K, D, h, weight, recent, y)
    run_rows(_mix_blocks, _FORM, B * -(-T // _BLOCK), _BLOCK * K * D, *inputs)
    return y


def _run_backward(
    h: Tensor, weight: Tensor, recent: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    (B, T, D), K = h.shape, weight.shape[0]
    num_blocks = B * -(-T // _BLOCK)
    dh, dweight = h.new_empty(h.shape), h.new_empty(num_blocks, K, D)
    drecent = recent.new_empty(recent.shape)
    inputs = (T, K, D, h, weight, recent, dy, dh, dweight, drecent)
    run_rows(_backward_blocks, _FORM, num_blocks, 3 * _BLOCK * K * D, *inputs)
    return dh, dweight.sum(dim=0), drecent


_convolve_recent = declare_operator(
    "convolve_recent", _run_forward, backward=_run_backward, gradients="h weight recent"
)


def convolve_recent_native(h: Tensor, weight: Tensor, recent: Tensor) -> Tensor:
    """Mix each channel over the last K tokens, the current one included (E19), on the CPU.

    Args:
        h: [B, T, D].
        weight: [K, D], the current token's filter last.
        recent: [B, K - 1, D], features of the tokens before.

    Returns:
        [B, T, D].
    """
    y: Tensor = _convolve_recent(h, weight, recent)
    return y
