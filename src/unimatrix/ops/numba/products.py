"""Small matrix products inside kernels, on operands that stay in a core's cache.

A library's product splits one product over all threads, waits for them, and leaves its result in
memory for the next operator. A kernel that holds some rows in cache does all its products on them
in one thread. On 48 to 128 rows and 64 to 352 columns this loop reaches the rate at which a large
product runs on one core.
"""
# mypy: allow-untyped-defs

from unimatrix.ops.numba import NUM_LANES
from unimatrix.ops.numba.compile import part
from unimatrix.ops.numba.lanes import OPTIONS, at, load, plus, store, times, zeros

LANES = (0,) * NUM_LANES  # numbers of columns are multiples


@part(**OPTIONS)
def _multiply_six(lanes, a, a_row, a_step, b, b_step, c, c_row, depth, adds):
    """Set or add to six rows and ``len(lanes)`` columns of c, in registers throughout."""
    sums = zeros(c, lanes)
    one, two, three, four, five, six = sums, sums, sums, sums, sums, sums
    if adds:
        one, two = load(c, 0, lanes), load(c, c_row, lanes)
        three, four = load(c, 2 * c_row, lanes), load(c, 3 * c_row, lanes)
        five, six = load(c, 4 * c_row, lanes), load(c, 5 * c_row, lanes)
    for k in range(depth):
        along, left = load(b, k * b_step, lanes), at(a, k * a_step)
        one, two = plus(one, times(along, left[0])), plus(two, times(along, left[a_row]))
        three = plus(three, times(along, left[2 * a_row]))
        four = plus(four, times(along, left[3 * a_row]))
        five = plus(five, times(along, left[4 * a_row]))
        six = plus(six, times(along, left[5 * a_row]))
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
        along, left = load(b, k * b_step, lanes), at(a, k * a_step)
        one, two = plus(one, times(along, left[0])), plus(two, times(along, left[a_row]))
    store(c, 0, one)
    store(c, c_row, two)


@part(**OPTIONS)
def multiply(
    lanes, a, a_row, a_step, b, b_panel, b_step, c, c_row, rows, columns, depth, adds
):  # fmt: skip
    """Set or add ``sum over k of a[i, k] * b[k, j]`` to c[i, j].

    Args:
        lanes: ``LANES``.
        a, a_row, a_step: an operand in any order; a[i, k] is ``a[i * a_row + k * a_step]``.
        b, b_panel, b_step: an operand in panels of ``len(lanes)`` columns; the row k of panel n
            starts at ``b[n * b_panel + k * b_step]``. ``order_panels`` is for a matrix whose
            rows are too many or a power of two apart, which cost cache; rows that lie close have
            ``len(lanes)`` from panel to panel.
        c, c_row: the result, its columns neighbours; it must not overlap with an operand.
        rows, columns, depth: sizes; ``columns`` a multiple of ``len(lanes)``.
        adds: add to what c holds.
    """
    sixes = rows - rows % 6
    twos = rows - rows % 2
    for j in range(0, columns, len(lanes)):
        right = at(b, j // len(lanes) * b_panel)
        for i in range(0, sixes, 6):
            left, target = at(a, i * a_row), at(c, i * c_row + j)
            _multiply_six(lanes, left, a_row, a_step, right, b_step, target, c_row, depth, adds)
        for i in range(sixes, twos, 2):
            left, target = at(a, i * a_row), at(c, i * c_row + j)
            _multiply_two(lanes, left, a_row, a_step, right, b_step, target, c_row, depth, adds)
        if twos < rows:  # twice the same row
            left, target = at(a, twos * a_row), at(c, twos * c_row + j)
            _multiply_two(lanes, left, 0, a_step, right, b_step, target, 0, depth, adds)
