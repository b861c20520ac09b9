"""One small kernel that relies on all that kernels rely on, and what it must compute."""
# mypy: allow-untyped-defs

import numpy as np
import torch

from unimatrix.ops.numba.compile import kernel, part
from unimatrix.ops.numba.lanes import OPTIONS, exponential, load, pointer, total
from unimatrix.ops.numba.products import LANES
from unimatrix.ops.numba.threads import Shaped, map_rows
from unimatrix.ops.numba.tiles import multiply_rows

_NUM_ROWS, _WIDTH = 5, len(LANES) + 3
_FACTOR, _OFFSET = 3, 7


@part(**OPTIONS)
def _sum_exponentials(lanes, row):
    """Return the sum of e to the power of the first numbers of a row."""
    return total(exponential(load(row, 0, lanes)))


@kernel(**OPTIONS)
def _fill_rows(first_row, last_row, form, numbers, weights, table, is_shifted):
    """Set for each row a product, which is a whole number, and a sum of exponentials."""
    lanes, (factor, offset) = form
    width = len(weights)
    for row in range(first_row, last_row):
        source = pointer(numbers, row * width)
        product = multiply_rows(lanes, source, pointer(weights, 0), width)
        table[row, 0] = factor * product + (offset if is_shifted else 0)
        table[row, 1] = _sum_exponentials(lanes, source)


def run_self_check() -> None:
    """Run the kernel as any other, in several threads.

    Raises:
        RuntimeError: if it does not compute what it must.
        Exception: whatever Numba raises where it cannot compile or call it.
    """
    numbers = (np.arange(_NUM_ROWS * _WIDTH) % 8).astype(np.float32).reshape(_NUM_ROWS, _WIDTH)
    weights = np.arange(_WIDTH, dtype=np.float32) - 4
    # A column lies between those that are written: the kernel has to go by the strides.
    table = np.zeros((_NUM_ROWS, 4))
    tensors = (torch.from_numpy(array) for array in (numbers, weights, table[:, ::2]))
    flat_numbers, flat_weights, columns = tensors
    args = (flat_numbers, flat_weights, Shaped(columns), True)
    map_rows(_fill_rows, _NUM_ROWS, (LANES, (_FACTOR, _OFFSET)), *args)
    expected = np.zeros_like(table)
    expected[:, 0] = _FACTOR * (numbers @ weights) + _OFFSET
    expected[:, 2] = np.exp(numbers[:, : len(LANES)].astype(np.float64)).sum(axis=1)
    if not np.allclose(table, expected, rtol=1e-5, atol=0.0):
        raise RuntimeError("a kernel whose results are known computes others")
