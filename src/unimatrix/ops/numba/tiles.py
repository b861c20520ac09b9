"""Parts of kernels for a tile: a few rows that one thread takes through several layers."""
# mypy: allow-untyped-defs

import math

import torch
from torch import Tensor

from unimatrix.ops.numba.compile import part
from unimatrix.ops.numba.lanes import OPTIONS, at, load, plus, store, times, total, zeros

TILE = 128
"""Rows of a tile; with the weights of a small model they fit a core's cache."""


def count_spans(num_tiles: int) -> int:
    """Return the number of spans that a kernel divides tiles into, a thread and a sum for each."""
    return min(torch.get_num_threads(), num_tiles)


def sum_spans(grads: Tensor) -> Tensor:
    """Return the sum over the spans of their gradients [S, n]; may write into the first row."""
    first, *others = grads.unbind()
    if len(others) > 1:
        return grads.sum(dim=0)
    return first.add_(*others) if others else first


@part(**OPTIONS)
def copy_rows(lanes, source, target, count):
    """Copy ``count`` numbers, a multiple of ``len(lanes)``."""
    for j in range(0, count, len(lanes)):
        store(target, j, load(source, j, lanes))


@part(**OPTIONS)
def add_rows(lanes, rows, count, width, target):
    """Add each of ``count`` rows to ``target``, a single row."""
    for row in range(count):
        for j in range(0, width, len(lanes)):
            store(target, j, plus(load(target, j, lanes), load(rows, row * width + j, lanes)))


@part(**OPTIONS)
def normalize_tile(form, x, rows, width, eps, scale, shift, units, h, h_row, inverses):
    """Normalise rows into ``units``, scale (and shift) these into ``h``; set ``inverses``.

    ``form.centred`` is an empty tuple for RMSNorm; otherwise the mean is taken off (LayerNorm).
    ``inverses`` are those of the rows' norms, for the backward pass.
    """
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
            centred = plus(load(source, j, lanes), mean)
            squares = plus(squares, times(centred, centred))
        inverse = 1 / math.sqrt(total(squares) / width + eps)
        for j in range(0, width, len(lanes)):
            normalized = times(plus(load(source, j, lanes), mean), inverse)
            store(unit, j, normalized)
            scaled = times(normalized, load(scale, j, lanes))
            if len(form.centred):
                scaled = plus(scaled, load(shift, j, lanes))
            store(target, j, scaled)
        inverses[row] = inverse


@part(**OPTIONS)
def normalize_tile_backward(form, dh, units, inverses, rows, width, scale, dx, dscale, dshift):
    """Add the gradient ``dh`` of ``normalize_tile``'s result to those of its rows and weights."""
    lanes = form.lanes
    for row in range(rows):
        unit, grad = at(units, row * width), at(dh, row * width)
        target = at(dx, row * width)
        products, sums = zeros(grad, lanes), zeros(grad, lanes)
        for j in range(0, width, len(lanes)):
            dh_j, unit_j = load(grad, j, lanes), load(unit, j, lanes)
            dunit_j = times(dh_j, load(scale, j, lanes))
            products, sums = plus(products, times(dunit_j, unit_j)), plus(sums, dunit_j)
            store(dscale, j, plus(load(dscale, j, lanes), times(dh_j, unit_j)))
            if len(form.centred):
                store(dshift, j, plus(load(dshift, j, lanes), dh_j))
        # A row's norm and mean do not change its unit row: those components of dunit are taken off.
        of_norm = -total(products) / width
        of_mean = -total(sums) / width if len(form.centred) else 0.0
        for j in range(0, width, len(lanes)):
            dunit_j = times(load(grad, j, lanes), load(scale, j, lanes))
            dunit_j = plus(plus(dunit_j, times(load(unit, j, lanes), of_norm)), of_mean)
            store(target, j, plus(load(target, j, lanes), times(dunit_j, inverses[row])))


@part(**OPTIONS)
def multiply_rows(lanes, a, b, width):
    """Return the inner product of two rows of any width."""
    whole_lanes = width - width % len(lanes)
    sums = zeros(a, lanes)
    for j in range(0, whole_lanes, len(lanes)):
        sums = plus(sums, times(load(a, j, lanes), load(b, j, lanes)))
    product = total(sums)
    for j in range(whole_lanes, width):
        product += a[j] * b[j]
    return product


@part(**OPTIONS)
def add_multiple(lanes, row, factor, width, target):
    """Add a multiple of a row of any width to ``target``."""
    whole_lanes = width - width % len(lanes)
    for j in range(0, whole_lanes, len(lanes)):
        store(target, j, plus(load(target, j, lanes), times(load(row, j, lanes), factor)))
    for j in range(whole_lanes, width):
        target[j] += factor * row[j]
