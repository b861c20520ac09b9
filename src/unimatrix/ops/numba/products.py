"""Small matrix products inside kernels, on operands that stay in a core's cache.

A library splits one product over all threads, waits for them, and leaves the result in memory for
the next operator. A kernel that has some rows in cache takes them through all its products in one
thread. On 48 to 128 rows and 64 to 352 columns this loop reaches the rate at which a large product
runs on one core.
"""
# mypy: allow-untyped-defs

from unimatrix.ops.numba import NUM_LANES
from unimatrix.ops.numba.compile import part
from unimatrix.ops.numba.lanes import OPTIONS, at, load, plus, store, times, zeros

LANES = (0,) * NUM_LANES
"""Given to a kernel, whose compiler reads the number of lanes from its type; columns are multiples
of that number."""


@part(**OPTIONS)
def _multiply_six(lanes, a, a_row, a_step, b, b_step, c, c_row, depth, adds):
    """Set, or add to, six rows and ``len(lanes)`` columns of c, which stay in registers."""
    sums = zeros(c, lanes)
    one, two, three, four, five, six = sums, sums, sums, sums, sums, sums
    if adds:
        one, two = load(c, 0, lanes), load(c, c_row, lanes)
        three, four = load(c, 2 * c_row, lanes), load(c, 3 * c_row, lanes)
        five, six = load(c, 4 * c_row, lanes), load(c, 5 * c_row, lanes)
    for k in range(depth):
        b_row, a_column = load(b, k * b_step, lanes), at(a, k * a_step)
        one, two = plus(one, times(b_row, a_column[0])), plus(two, times(b_row, a_column[a_row]))
        three = plus(three, times(b_row, a_column[2 * a_row]))
        four = plus(four, times(b_row, a_column[3 * a_row]))
        five = plus(five, times(b_row, a_column[4 * a_row]))
        six = plus(six, times(b_row, a_column[5 * a_row]))
    store(c, 0, one)
    store(c, c_row, two)
    store(c, 2 * c_row, three)
    store(c, 3 * c_row, four)
    store(c, 4 * c_row, five)
    store(c, 5 * c_row, six)


@part(**OPTIONS)
def _multiply_two(lanes, a, a_row, a_step, b, b_step, c, c_row, depth, adds):
    """As ``_multiply_six``, for two rows."""
    one, two = zeros(c, lanes), zeros(c, lanes)
    if adds:
        one, two = load(c, 0, lanes), load(c, c_row, lanes)
    for k in range(depth):
        b_row, a_column = load(b, k * b_step, lanes), at(a, k * a_step)
        one, two = plus(one, times(b_row, a_column[0])), plus(two, times(b_row, a_column[a_row]))
    store(c, 0, one)
    store(c, c_row, two)


@part(**OPTIONS)
def multiply(
    lanes, a, a_row, a_step, b, b_panel, b_step, c, c_row, rows, columns, depth, adds
):  # fmt: skip
    """Set or add ``sum over k of a[i, k] * b[k, j]`` to c[i, j].

    Args:
        lanes: ``LANES``.
        a, a_row, a_step: a matrix with any strides; a[i, k] is ``a[i * a_row + k * a_step]``.
        b, b_panel, b_step: a matrix in panels of ``len(lanes)`` columns; row k of panel n starts at
            ``b[n * b_panel + k * b_step]``. A plain matrix of few rows has a panel stride of
            ``len(lanes)``. Rows that are many, or a power of two apart, cost cache: copy such a
            matrix in the order of ``kernels.passes.weights.order_panels`` first.
        c, c_row: the result; columns are neighbours. c must not overlap with a or b.
        rows, columns, depth: sizes; ``columns`` is a multiple of ``len(lanes)``.
        adds: whether to add to c instead of setting it.
    """
    sixes = rows - rows % 6
    twos = rows - rows % 2
    for j in range(0, columns, len(lanes)):
        panel = at(b, j // len(lanes) * b_panel)
        for i in range(0, sixes, 6):
            first, target = at(a, i * a_row), at(c, i * c_row + j)
            _multiply_six(lanes, first, a_row, a_step, panel, b_step, target, c_row, depth, adds)
        for i in range(sixes, twos, 2):
            first, target = at(a, i * a_row), at(c, i * c_row + j)
            _multiply_two(lanes, first, a_row, a_step, panel, b_step, target, c_row, depth, adds)
        if twos < rows:
            # A last single row: with strides of 0 both rows of the pair are this one.
            first, target = at(a, twos * a_row), at(c, twos * c_row + j)
            _multiply_two(lanes, first, 0, a_step, panel, b_step, target, 0, depth, adds)
