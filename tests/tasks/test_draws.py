import numpy as np
import pytest

from unimatrix.data.counter_random import draw_words
from unimatrix.tasks.draws import draw_columns, draw_distinct, draw_power_law_gaps, shuffle

ROWS = np.arange(20_000)


def test_columns_are_the_words_of_an_item_in_order():
    parts = draw_columns(3, ROWS[:5], [2, 0, 4])
    assert [part.shape for part in parts] == [(5, 2), (5, 0), (5, 4)]
    assert (np.concatenate(parts, axis=1) == draw_words(3, ROWS[:5], 6)).all()


@pytest.mark.parametrize(("count", "size"), [(1, 1), (3, 5), (5, 5)])
def test_distinct_numbers_are_distinct_and_uniform_at_every_place(count, size):
    drawn = draw_distinct(draw_words(0, ROWS, count), size)
    assert drawn.shape == (len(ROWS), count)
    assert all(len(set(row)) == count for row in drawn[:500].tolist())
    expected = len(ROWS) / size
    for place in range(count):
        counts = np.bincount(drawn[:, place], minlength=size)
        assert len(counts) == size
        assert abs(counts - expected).max() < 6 * expected**0.5


def test_all_permutations_are_equally_likely():
    for permutations in (draw_distinct(draw_words(1, ROWS, 3), 3), shuffle(draw_words(1, ROWS, 3))):
        counts = np.unique(permutations, axis=0, return_counts=True)[1]
        assert len(counts) == 6
        assert abs(counts - len(ROWS) / 6).max() < 6 * (len(ROWS) / 6) ** 0.5


def test_gaps_follow_the_power_law_without_replacement():
    gaps = draw_power_law_gaps(draw_words(2, ROWS, 6), 2)
    weights = np.arange(1, 7) ** -0.99
    law = weights / weights.sum()
    # First gap: p. Second gap after the first: p renormalised without it.
    both = law[:, None] * law / (1 - law[:, None])
    np.fill_diagonal(both, 0)
    counts = np.bincount(gaps[:, 0] * 6 + gaps[:, 1], minlength=36).reshape(6, 6)
    expected = len(ROWS) * both
    assert (np.diagonal(counts) == 0).all()
    assert (abs(counts - expected) <= 6 * expected**0.5).all()


def test_as_many_gaps_as_places_are_a_permutation():
    gaps = draw_power_law_gaps(draw_words(2, ROWS[:50], 16), 16)
    assert (np.sort(gaps, axis=1) == np.arange(16)).all()
