"""The short convolution in Numba: one pass forward, one backward."""
# mypy: allow-untyped-defs

import numpy as np
from torch import Tensor

from unimatrix.ops.numba.compile import kernel, part
from unimatrix.ops.numba.lanes import OPTIONS, load, plus, pointer, store, times
from unimatrix.ops.numba.threads import run_rows
from unimatrix.ops.operator import declare_operator

_FORM = ((0,) * 16, (0,))  # numbers handled together; those left at a row's end
_BLOCK = 64  # tokens that share one sum for the filters' gradient


@part(**OPTIONS)
def _copy(source, target, num_numbers):
    for j in range(num_numbers):
        target[j] = source[j]


@part(**OPTIONS)
def _find_window(b, t, num_tokens, num_taps, width, h, recent, edge):
    """Return K tokens of row b in a row, the last of them t; copied to ``edge`` at the start."""
    first = t - num_taps + 1
    if first >= 0:
        return pointer(h, (b * num_tokens + first) * width)
    before = pointer(recent, (b * (num_taps - 1) + t) * width)
    _copy(before, pointer(edge, 0), -first * width)
    _copy(pointer(h, b * num_tokens * width), pointer(edge, -first * width), (t + 1) * width)
    return pointer(edge, 0)


@part(**OPTIONS)
def _find_outputs(b, t, num_tokens, num_taps, width, dy, edge):
    """Return the gradients of K outputs from t on; zeros stand for those that do not exist."""
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
def _mix_part(lanes, j, num_taps, width, window, weight, target):
    mixed = times(load(window, j, lanes), load(weight, j, lanes))
    for at in range(width + j, num_taps * width, width):
        mixed = plus(mixed, times(load(window, at, lanes), load(weight, at, lanes)))
    store(target, j, mixed)


@part(**OPTIONS)
def _gather_part(lanes, j, num_taps, width, outputs, weight, target):
    """Add up what the outputs of a token and after say of it: taps in the other order."""
    last = (num_taps - 1) * width + j
    total = times(load(outputs, j, lanes), load(weight, last, lanes))
    for back in range(width, num_taps * width, width):
        weighed = times(load(outputs, back + j, lanes), load(weight, last - back, lanes))
        total = plus(total, weighed)
    store(target, j, total)


@part(**OPTIONS)
def _weigh_part(lanes, j, num_taps, width, window, grad, by_weight):
    """Add to the filters' gradient what a token saw."""
    along = load(grad, j, lanes)
    for at in range(j, num_taps * width, width):
        seen = times(along, load(window, at, lanes))
        store(by_weight, at, plus(load(by_weight, at, lanes), seen))


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
                _mix_part(lanes, j, num_taps, width, window, filters, target)
            for j in range(even, width):
                _mix_part(one_lane, j, num_taps, width, window, filters, target)


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
        by_weight = pointer(dweight, block * num_taps * width)
        for j in range(num_taps * width):
            by_weight[j] = 0
        for t in range(start if start else 1 - num_taps, min(start + _BLOCK, num_tokens)):
            outputs = _find_outputs(b, t, num_tokens, num_taps, width, dy, edge)
            target = pointer(drecent, ((b + 1) * (num_taps - 1) + t) * width)
            if t >= 0:
                target = pointer(dh, (b * num_tokens + t) * width)
            for j in range(0, even, len(lanes)):
                _gather_part(lanes, j, num_taps, width, outputs, filters, target)
            for j in range(even, width):
                _gather_part(one_lane, j, num_taps, width, outputs, filters, target)
            if t < 0:
                continue
            window = _find_window(b, t, num_tokens, num_taps, width, h, recent, edge)
            grad = pointer(dy, (b * num_tokens + t) * width)
            for j in range(0, even, len(lanes)):
                _weigh_part(lanes, j, num_taps, width, window, grad, by_weight)
            for j in range(even, width):
                _weigh_part(one_lane, j, num_taps, width, window, grad, by_weight)


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
    """Compute E19 on the CPU; arguments as in ``convolve_recent``."""
    y: Tensor = _convolve_recent(h, weight, recent)
    return y
