"""What kernels do with a tile: a few rows that a thread takes through several layers."""
# mypy: allow-untyped-defs

import math

import torch
from torch import Tensor

from unimatrix.ops.numba.compile import part
from unimatrix.ops.numba.lanes import OPTIONS, at, load, plus, store, times, total, zeros

TILE = 128  # rows; with the weights of small models they stay in a core's cache


def count_spans(num_tiles: int) -> int:
    """Return in how many spans of tiles a kernel runs, each with gradients of its own."""
    return min(torch.get_num_threads(), num_tiles)


def sum_spans(grads: Tensor) -> Tensor:
    """Return the sum of the spans' gradients [S, n]; may write into the first."""
    first, *others = grads.unbind()
    if len(others) > 1:
        return grads.sum(dim=0)
    return first.add_(*others) if others else first


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Return whether a backward pass may come that needs what a kernel computes."""
    given = (tensor for tensor in tensors if tensor is not None)
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)


@part(**OPTIONS)
def copy_rows(lanes, source, target, count):
    """Copy ``count`` numbers, a multiple of the lanes."""
    for j in range(0, count, len(lanes)):
        store(target, j, load(source, j, lanes))


@part(**OPTIONS)
def add_rows(lanes, rows, count, width, target):
    """Add ``count`` rows to ``target``, one of them."""
    for row in range(count):
        for j in range(0, width, len(lanes)):
            store(target, j, plus(load(target, j, lanes), load(rows, row * width + j, lanes)))


@part(**OPTIONS)
def normalize_tile(form, x, rows, width, eps, scale, shift, units, h, h_row, inverses):
    """Set ``units`` to the normalised rows, ``h`` to these scaled; keep the divisors' inverses."""
    lanes = form.lanes
    for row in range(rows):
        source, unit, target = at(x, row * width), at(units, row * width), at(h, row * h_row)
        mean = zeros(source, lanes)
        if len(form.centred):
            for j in range(0, width, len(lanes)):
                mean = plus(mean, load(source, j, lanes))
            mean = plus(zeros(source, lanes), -total(mean) / width)
        squares = zeros(source, lanes)
        for j in range(0, width, len(lanes)):
            part = plus(load(source, j, lanes), mean)
            squares = plus(squares, times(part, part))
        inverse = 1 / math.sqrt(total(squares) / width + eps)
        for j in range(0, width, len(lanes)):
            part = times(plus(load(source, j, lanes), mean), inverse)
            store(unit, j, part)
            part = times(part, load(scale, j, lanes))
            if len(form.centred):
                part = plus(part, load(shift, j, lanes))
            store(target, j, part)
        inverses[row] = inverse


@part(**OPTIONS)
def normalize_tile_backward(form, dh, units, inverses, rows, width, scale, dx, dscale, dshift):
    """Add to ``dx`` what comes through the norm, and to the gradients of its weights."""
    lanes = form.lanes
    for row in range(rows):
        unit, grad = at(units, row * width), at(dh, row * width)
        target = at(dx, row * width)
        along, level = zeros(grad, lanes), zeros(grad, lanes)
        for j in range(0, width, len(lanes)):
            slope, place = load(grad, j, lanes), load(unit, j, lanes)
            moved = times(slope, load(scale, j, lanes))
            along, level = plus(along, times(moved, place)), plus(level, moved)
            store(dscale, j, plus(load(dscale, j, lanes), times(slope, place)))
            if len(form.centred):
                store(dshift, j, plus(load(dshift, j, lanes), slope))
        outward = -total(along) / width
        mean = -total(level) / width if len(form.centred) else 0.0
        for j in range(0, width, len(lanes)):
            inward = times(load(grad, j, lanes), load(scale, j, lanes))
            inward = plus(plus(inward, times(load(unit, j, lanes), outward)), mean)
            store(target, j, plus(load(target, j, lanes), times(inward, inverses[row])))


@part(**OPTIONS)
def multiply_rows(lanes, one, other, width):
    """Return the sum of the products of two rows' numbers; of any width."""
    even = width - width % len(lanes)
    sums = zeros(one, lanes)
    for j in range(0, even, len(lanes)):
        sums = plus(sums, times(load(one, j, lanes), load(other, j, lanes)))
    product = total(sums)
    for j in range(even, width):
        product += one[j] * other[j]
    return product


@part(**OPTIONS)
def add_multiple(lanes, row, factor, width, target):
    """Add a multiple of a row to ``target``; of any width."""
    even = width - width % len(lanes)
    for j in range(0, even, len(lanes)):
        store(target, j, plus(load(target, j, lanes), times(load(row, j, lanes), factor)))
    for j in range(even, width):
        target[j] += factor * row[j]
