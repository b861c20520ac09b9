"""The gated linear unit in Numba: one pass forward, one backward."""
# mypy: allow-untyped-defs

from torch import Tensor

from unimatrix.kernels.passes.gated_sum_native import sigmoid
from unimatrix.ops.numba.compile import kernel, part
from unimatrix.ops.numba.lanes import OPTIONS, load, minus, plus, pointer, store, times, zeros
from unimatrix.ops.numba.threads import run_rows
from unimatrix.ops.operator import declare_operator

_FORM = ((0,) * 16, (0,))
"""Lanes, and the single lane of rows that have fewer numbers."""
_WORK = 8
"""Multiply-adds in the time that a number takes."""


@part(**OPTIONS)
def _apply_lanes(lanes, j, width, x, y):
    gate, up = load(x, j, lanes), load(x, width + j, lanes)
    share = sigmoid(gate, plus(zeros(x, lanes), 1.0))
    store(y, j, times(times(gate, share), up))


@part(**OPTIONS)
def _backward_lanes(lanes, j, width, x, dy, dx):
    gate, up, dy_j = load(x, j, lanes), load(x, width + j, lanes), load(dy, j, lanes)
    ones = plus(zeros(x, lanes), 1.0)
    share = sigmoid(gate, ones)
    silu = times(gate, share)
    store(dx, width + j, times(dy_j, silu))
    slope = plus(share, times(silu, minus(ones, share)))
    store(dx, j, times(times(dy_j, up), slope))


@kernel(**OPTIONS)
def _apply_rows(first, last, form, width, x, y):
    lanes, one_lane = form
    even = width - width % len(lanes)
    for row in range(first, last):
        source, target = pointer(x, 2 * row * width), pointer(y, row * width)
        for j in range(0, even, len(lanes)):
            _apply_lanes(lanes, j, width, source, target)
        if 0 < even < width:  # the last lanes overlap with those before
            _apply_lanes(lanes, width - len(lanes), width, source, target)
        elif even == 0:
            for j in range(width):
                _apply_lanes(one_lane, j, width, source, target)


@kernel(**OPTIONS)
def _backward_rows(first, last, form, width, x, dy, dx):
    lanes, one_lane = form
    even = width - width % len(lanes)
    for row in range(first, last):
        source, target = pointer(x, 2 * row * width), pointer(dx, 2 * row * width)
        grad = pointer(dy, row * width)
        for j in range(0, even, len(lanes)):
            _backward_lanes(lanes, j, width, source, grad, target)
        if 0 < even < width:  # the last lanes overlap with those before
            _backward_lanes(lanes, width - len(lanes), width, source, grad, target)
        elif even == 0:
            for j in range(width):
                _backward_lanes(one_lane, j, width, source, grad, target)


def _run_forward(x: Tensor) -> Tensor:
    width = x.shape[-1] // 2
    y = x.new_empty(*x.shape[:-1], width)
    run_rows(_apply_rows, _FORM, x.numel() // (2 * width), _WORK * width, width, x, y)
    return y


def _run_backward(x: Tensor, dy: Tensor) -> tuple[Tensor]:
    width, dx = x.shape[-1] // 2, x.new_empty(x.shape)
    num_rows = x.numel() // (2 * width)
    run_rows(_backward_rows, _FORM, num_rows, 2 * _WORK * width, width, x, dy, dx)
    return (dx,)


_apply_gated_unit = declare_operator(
    "apply_gated_unit", _run_forward, backward=_run_backward, gradients="x"
)


def apply_gated_unit_native(gate_and_up: Tensor) -> Tensor:
    """Return SiLU of the first half of the features [..., 2 F] times the second (E23)."""
    y: Tensor = _apply_gated_unit(gate_and_up)
    return y
