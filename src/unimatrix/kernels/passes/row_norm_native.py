"""Root-mean-square normalisation in Numba, with its backward in one pass."""
# mypy: allow-untyped-defs

import math

from torch import Tensor

from unimatrix.kernels.passes.weights import hold_float
from unimatrix.ops.numba.compile import kernel
from unimatrix.ops.numba.lanes import OPTIONS, load, plus, pointer, store, times, total, zeros
from unimatrix.ops.numba.threads import run_rows
from unimatrix.ops.operator import declare_operator

_LANES = (0,) * 16
"""A row's last D % 16 numbers go one by one."""
_ROWS_PER_BLOCK = 64
"""Rows that share one sum for the weight's gradient."""


@kernel(**OPTIONS)
def _normalize_blocks(first, last, lanes, num_rows, width, x, weight, eps, y, inverses):
    even = width - width % len(lanes)
    for row in range(first * _ROWS_PER_BLOCK, min(last * _ROWS_PER_BLOCK, num_rows)):
        source, target, scale = pointer(x, row * width), pointer(y, row * width), pointer(weight, 0)
        squares = zeros(source, lanes)
        for j in range(0, even, len(lanes)):
            part = load(source, j, lanes)
            squares = plus(squares, times(part, part))
        square = total(squares)
        for j in range(even, width):
            square += source[j] * source[j]
        inverse = 1 / math.sqrt(square / width + eps[0])
        for j in range(0, even, len(lanes)):
            store(target, j, times(times(load(source, j, lanes), inverse), load(scale, j, lanes)))
        for j in range(even, width):
            target[j] = source[j] * inverse * scale[j]
        inverses[row] = inverse


@kernel(**OPTIONS)
def _backward_blocks(
    first, last, lanes, num_rows, width, x, weight, inverses, dy, dx, dweight
):  # fmt: skip
    even = width - width % len(lanes)
    scale = pointer(weight, 0)
    for block in range(first, last):
        dscale = pointer(dweight, block * width)
        for j in range(width):
            dscale[j] = 0
        for row in range(block * _ROWS_PER_BLOCK, min((block + 1) * _ROWS_PER_BLOCK, num_rows)):
            source, grad = pointer(x, row * width), pointer(dy, row * width)
            target, inverse = pointer(dx, row * width), inverses[row]
            products = zeros(source, lanes)
            for j in range(0, even, len(lanes)):
                product = times(load(source, j, lanes), load(grad, j, lanes))
                products = plus(products, times(product, load(scale, j, lanes)))
                store(dscale, j, plus(load(dscale, j, lanes), times(product, inverse)))
            # The component along the row itself, which the norm takes off.
            component = total(products)
            for j in range(even, width):
                last_product = source[j] * grad[j]
                component += last_product * scale[j]
                dscale[j] += last_product * inverse
            component *= -inverse * inverse / width
            for j in range(0, even, len(lanes)):
                dunit_j = times(load(grad, j, lanes), load(scale, j, lanes))
                dunit_j = plus(dunit_j, times(load(source, j, lanes), component))
                store(target, j, times(dunit_j, inverse))
            for j in range(even, width):
                target[j] = (grad[j] * scale[j] + source[j] * component) * inverse


def _run_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    width = x.shape[-1]
    num_rows = x.numel() // width
    y, inverses = x.new_empty(x.shape), x.new_empty(num_rows)
    sizes = (-(-num_rows // _ROWS_PER_BLOCK), 4 * _ROWS_PER_BLOCK * width)
    inputs = (num_rows, width, x, weight, hold_float(eps, x.dtype), y, inverses)
    run_rows(_normalize_blocks, _LANES, *sizes, *inputs)
    return y, inverses


def _run_backward(x: Tensor, weight: Tensor, inverses: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    width, num_rows = x.shape[-1], inverses.numel()
    num_blocks = -(-num_rows // _ROWS_PER_BLOCK)
    dx, dweight = x.new_empty(x.shape), x.new_empty(num_blocks, width)
    inputs = (num_rows, width, x, weight, inverses, dy, dx, dweight)
    run_rows(_backward_blocks, _LANES, num_blocks, 4 * _ROWS_PER_BLOCK * width, *inputs)
    return dx, dweight.sum(dim=0)


_normalize_rows = declare_operator(
    "normalize_rows",
    _run_forward,
    backward=_run_backward,
    results="y",
    saved="inverses",
    gradients="x weight",
)


def normalize_rows_native(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Divide each feature vector by the root of its mean square, and scale (E22), on the CPU.

    Args:
        x: [..., D].
        weight: [D]; ``None`` is ones.
        eps: added to the mean square.
    """
    if weight is None:
        weight = x.new_ones(x.shape[-1])
    y: Tensor = _normalize_rows(x, weight.to(x.dtype), eps)
    return y
