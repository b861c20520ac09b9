"""The weights of a compiled pass: one flat tensor, and copies in the order of reading."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from unimatrix.ops.numba import NUM_LANES as NUM_LANES


class PassWeights(NamedTuple):
    """All weights of a pass, prepared once for the several times that it runs.

    Attributes:
        row: [n], all weights flattened, in the order in which kernels write their gradients; it is
            the tensor that has a gradient.
        panels: [m], copies of the matrices in the order in which products read them.
        sizes: of the weights, as the kernels take them.
        eps: of the pass's norm, if it has one.
    """

    row: Tensor
    panels: Tensor
    sizes: tuple[int, ...]
    eps: float = 0.0


def join_weights(
    weights: Sequence[Tensor], order: Tensor, sizes: tuple[int, ...], eps: float = 0.0
) -> PassWeights:
    """Flatten weights into one row, and copy the matrices in the order in which products read them.

    Args:
        weights: in the order of the kernels' gradients.
        order: [m] int32, the place in the row of each number of the panels.
        sizes, eps: as in ``PassWeights``.
    """
    flat = [weight.reshape(-1) for weight in weights]
    row = flat[0] if len(flat) == 1 else torch.cat(flat)
    return PassWeights(row, row.detach().index_select(0, order), sizes, eps)


def order_panels(matrices: Sequence[tuple[int, int, int]]) -> Tensor:
    """Return the indices into a row of what products read: all transposes, then all matrices.

    Panels are those of ``ops.numba.products.multiply``: [columns / 16, rows, 16] of [rows,
    columns]. A transpose is filled up to a multiple of 16 columns by repeating its last one;
    nothing reads the products there.

    Args:
        matrices: index of the first number, rows, and columns (a multiple of 16) of each.

    Returns:
        [m] int32.
    """
    if torch.compiler.is_compiling():  # a graph takes the result as a constant, not the cache
        return _order_panels(tuple(matrices))
    return _recall_order(tuple(matrices))


def _order_panels(matrices: tuple[tuple[int, int, int], ...]) -> Tensor:
    indices = [
        torch.arange(first, first + rows * columns, dtype=torch.int32).view(rows, columns)
        for first, rows, columns in matrices
    ]
    filled = [torch.arange(rows + -rows % NUM_LANES).clamp(max=rows - 1) for _, rows, _ in matrices]
    across = [index[rows].t() for index, rows in zip(indices, filled, strict=True)]
    return torch.cat([_cut_panels(index) for index in (*across, *indices)])


_recall_order = functools.lru_cache(maxsize=64)(_order_panels)


def _cut_panels(matrix: Tensor) -> Tensor:
    """Return the panels of a matrix one after the other."""
    return matrix.reshape(matrix.shape[0], -1, NUM_LANES).transpose(0, 1).reshape(-1)


@functools.lru_cache(maxsize=64)
def hold_float(number: float, dtype: torch.dtype) -> Tensor:
    """Return a number in a tensor [1]: kernels take no floats of a given type."""
    return torch.tensor([number], dtype=dtype)
