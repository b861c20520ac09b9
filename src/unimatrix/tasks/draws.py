"""Numbers, permutations, distinct ids and gaps, drawn from random words."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from unimatrix.data.counter_random import draw_words

_GAP_POWER = 0.01
"""Gap g has weight (g + 1) ** (power - 1), so that most questions come early."""


def draw_columns(
    seed: int, indices: NDArray[np.int64], sizes: Sequence[int]
) -> list[NDArray[np.uint64]]:
    """Draw the words of items in parts: one array [n, size] for each of ``sizes``."""
    words = draw_words(seed, indices, sum(sizes))
    return np.split(words, np.cumsum(sizes)[:-1], axis=1)


def reduce_words(words: NDArray[np.uint64], size: int) -> NDArray[np.int64]:
    """Map words of any shape to 0..size-1, uniform to size / 2**64."""
    return (words % np.uint64(size)).astype(np.int64)


def shuffle(words: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return a random permutation of 0..m-1 for each row of words [n, m]."""
    return np.argsort(words, axis=1, kind="stable").astype(np.int64)


def draw_distinct(words: NDArray[np.uint64], size: int) -> NDArray[np.int64]:
    """Draw k distinct numbers [n, k] of 0..size-1 in random order, a row for each of words [n, k].

    Cost:
        The first k swaps of a Fisher-Yates shuffle: k words a row and 4 n size bytes.
    """
    num_rows, count = words.shape
    assert count <= size, (count, size)
    rows = np.arange(num_rows)
    pool = np.tile(np.arange(size, dtype=np.int32), (num_rows, 1))
    drawn = np.empty((num_rows, count), np.int64)
    for place in range(count):
        chosen = place + reduce_words(words[:, place], size - place)
        drawn[:, place] = pool[rows, chosen]
        pool[rows, chosen] = pool[:, place]
    return drawn


def draw_power_law_gaps(words: NDArray[np.uint64], count: int) -> NDArray[np.int64]:
    """Draw ``count`` distinct gaps of 0..m-1 for each row of words [n, m].

    Gap g is drawn without replacement with probability proportional to (g + 1) ** (0.01 - 1).

    Source: zoology ``data/multiquery_ar.py``, ``power_a=0.01``.

    Returns:
        [n, count] int64, in the order drawn.

    Note:
        The Gumbel top-k trick as a race: the ``count`` smallest of exponential arrival times with
        the weights as rates are a draw without replacement, in its order.
    """
    num_gaps = words.shape[1]
    assert count <= num_gaps, (count, num_gaps)
    weights = np.arange(1, num_gaps + 1, dtype=np.float64) ** (_GAP_POWER - 1)
    uniform = ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53  # inside (0, 1)
    arrivals = -np.log(uniform) / weights
    return np.argsort(arrivals, axis=1, kind="stable")[:, :count].astype(np.int64)
