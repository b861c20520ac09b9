"""What lies between a place and its entries, compiled: levels of boundaries, and their sums."""
# mypy: allow-untyped-defs

import math

from unimatrix.ops.indexed_attention.entries import BEFORE, NUM_OFFSETS
from unimatrix.ops.numba.compile import part
from unimatrix.ops.numba.lanes import OPTIONS


@part(**OPTIONS)
def sum_boundaries(key_rows, values, stride, width, boundary, levels, sums):
    """Set what each entry of a place loses for the boundaries between the two.

    Args:
        key_rows: [80], the rows of the entries' keys; -1 for none.
        values: of one head and stream, ``stride`` numbers apart.
        width: C.
        boundary: [2 C + 1], of one head.
        levels: [80], set to the boundary of each entry's token, at least 0.
        sums: [80], set to the sums of these from the place to the entry, negated.
    """
    for e in range(NUM_OFFSETS):
        levels[e] = 0
        if e == 0 or key_rows[e] < 0:
            continue
        level = boundary[2 * width]
        value = (key_rows[e] >> 1) * stride
        for j in range(width):
            level += boundary[j] * values[value + j]
        if key_rows[e - 1] >= 0:
            value = (key_rows[e - 1] >> 1) * stride
            for j in range(width):
                level += boundary[width + j] * values[value + j]
        levels[e] = max(level, 0) + math.log1p(math.exp(-abs(level)))
    sums[BEFORE] = 0
    for e in range(BEFORE + 1, NUM_OFFSETS):
        sums[e] = sums[e - 1] - levels[e]
    for e in range(BEFORE - 1, -1, -1):
        sums[e] = sums[e + 1] - levels[e + 1]


@part(**OPTIONS)
def add_boundary_gradients(
    key_rows, values, stride, width, boundary, levels, slopes, dvalues, dboundary
):
    """Add the gradients of values and boundaries; arguments as of ``sum_boundaries``.

    Args:
        slopes: [80], the gradients of ``sums``; overwritten.
        dvalues: added to, as ``values``.
        dboundary: [2 C + 1], added to.
    """
    for e in range(NUM_OFFSETS - 2, BEFORE, -1):
        slopes[e] += slopes[e + 1]
    for e in range(1, BEFORE):
        slopes[e] += slopes[e - 1]
    for e in range(1, NUM_OFFSETS):
        if key_rows[e] < 0:
            continue
        # An entry behind the place crosses its own boundary, one before it the next entry's.
        slope = slopes[e] if e > BEFORE else slopes[e - 1]
        slope *= math.exp(-levels[e]) - 1
        dboundary[2 * width] += slope
        value = (key_rows[e] >> 1) * stride
        for j in range(width):
            dboundary[j] += slope * values[value + j]
            dvalues[value + j] += slope * boundary[j]
        if key_rows[e - 1] >= 0:
            value = (key_rows[e - 1] >> 1) * stride
            for j in range(width):
                dboundary[width + j] += slope * values[value + j]
                dvalues[value + j] += slope * boundary[width + j]
