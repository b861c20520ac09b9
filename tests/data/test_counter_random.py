import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unimatrix.data.counter_random import draw_words
from unimatrix.errors import InputError


@given(
    seed=st.integers(0, 2**70),
    indices=st.lists(st.integers(0, 2**40) | st.integers(0, 9), max_size=12),
    num_words=st.integers(1, 9),
)
@settings(deadline=None)
def test_an_item_gets_the_same_words_alone_and_in_any_company(seed, indices, num_words):
    array = np.array(indices, np.int64)
    together = draw_words(seed, array, num_words)
    assert together.shape == (len(indices), num_words)
    for row, index in zip(together, indices, strict=True):
        assert np.array_equal(row, draw_words(seed, np.array([index]), num_words)[0])


def test_items_and_seeds_differ():
    words = [draw_words(seed, np.arange(1000), 3) for seed in range(5)]
    assert len(np.unique(np.stack(words))) == 5 * 1000 * 3


def test_the_words_are_the_same_for_ever():
    words = draw_words(7, np.array([0, 1, 10**12]), 2)
    assert words.tolist() == [
        [8648156199155761070, 7861003179181181637],
        [2559217609339410627, 9444483039059783732],
        [6787603635216596184, 6634213796764351176],
    ]


def test_words_are_uniform():
    words = draw_words(0, np.arange(20_000), 1)[:, 0]
    counts = np.bincount((words % np.uint64(10)).astype(np.int64), minlength=10)
    assert abs(counts - 2000).max() < 250  # 5.9 standard deviations
    high = np.bincount((words >> np.uint64(60)).astype(np.int64), minlength=16)
    assert abs(high - 1250).max() < 200


def test_a_negative_seed_is_refused():
    with pytest.raises(InputError, match="-3"):
        draw_words(-3, np.arange(2), 1)
