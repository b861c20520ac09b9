"""The weights that a compiled pass is given: one row of numbers, and copies in reading order."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from unimatrix.ops.numba import NUM_LANES as NUM_LANES


class PassWeights(NamedTuple):
    """All weights of a pass, prepared once for the several times that it runs.

    Attributes:
        row: [n], the weights one after the other as the kernels' gradients lie, to which those go.
        panels: [m], the matrices among them again in the order in which products read them, without
            gradient.
        sizes: what the kernels are told about the row.
        eps: of the pass's norm, where it has one.
    """

    row: Tensor
    panels: Tensor
    sizes: tuple[int, ...]
    eps: float = 0.0


def join_weights(
    weights: Sequence[Tensor], order: Tensor, sizes: tuple[int, ...], eps: float = 0.0
) -> PassWeights:
    """Lay weights one after the other, and copy them in the order in which products read them.

    Args:
        weights: in the order of the kernels' gradients.
        order: [m] int32, the place in the row of each number of the panels.
        sizes, eps: as in ``PassWeights``.
    """
    flat = [weight.reshape(-1) for weight in weights]
    row = flat[0] if len(flat) == 1 else torch.cat(flat)
    return PassWeights(row, row.detach().index_select(0, order), sizes, eps)


def order_panels(matrices: Sequence[tuple[int, int, int]]) -> Tensor:
    """Return the places in a row of what products read: of all transposes, then of all matrices.

    Panels are as in ``products_native.multiply``: [columns / 16, rows, 16] of [rows, columns].
    Columns of a transpose that are missing to a multiple of 16 repeat the last, and no product's
    result is read there.

    Args:
        matrices: place of the first number, rows, and columns (a multiple of 16) of each.

    Returns:
        [m] int32.
    """
    if torch.compiler.is_compiling():  # its results are constants of the graph
        return _order_panels(tuple(matrices))
    return _recall_order(tuple(matrices))


def _order_panels(matrices: tuple[tuple[int, int, int], ...]) -> Tensor:
    places = [
        torch.arange(first, first + rows * columns, dtype=torch.int32).view(rows, columns)
        for first, rows, columns in matrices
    ]
    filled = [torch.arange(rows + -rows % NUM_LANES).clamp(max=rows - 1) for _, rows, _ in matrices]
    across = [place[rows].t() for place, rows in zip(places, filled, strict=True)]
    return torch.cat([_cut_panels(place) for place in (*across, *places)])


_recall_order = functools.lru_cache(maxsize=64)(_order_panels)


def _cut_panels(matrix: Tensor) -> Tensor:
    """Return the panels of a matrix one after the other."""
    return matrix.reshape(matrix.shape[0], -1, NUM_LANES).transpose(0, 1).reshape(-1)


@functools.lru_cache(maxsize=64)
def hold_float(number: float, dtype: torch.dtype) -> Tensor:
    """Return a number as kernels take it, in a tensor [1]."""
    return torch.tensor([number], dtype=dtype)
