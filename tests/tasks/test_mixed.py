"""Tasks in turn: which item is of which task, and that an item is always the same."""

import numpy as np
import pytest
import torch

from unimatrix.errors import InputError
from unimatrix.tasks import AssociativeRecall, RotatingDataset

LENGTHS = (24, 32, 40)
TASKS = [AssociativeRecall(num_pairs=3, window_tokens=length) for length in LENGTHS]


def build(num_examples=30, batch_size=4, seed=5):
    return RotatingDataset(TASKS, seed, num_examples, batch_size)


def test_every_batch_is_of_the_next_task() -> None:
    dataset = build()
    assert len(dataset) == 30
    for first in range(0, 28, 4):
        items = dataset.__getitems__(list(range(first, first + 4)))
        expected = LENGTHS[first // 4 % 3]
        assert [len(item["input_ids"]) for item in items] == [expected] * 4


def test_an_item_is_the_same_however_it_is_asked_for() -> None:
    dataset, other_size = build(), build(num_examples=100)
    for index in (0, 3, 4, 11, 12, 29):
        task = TASKS[index // 4 % 3]
        expected = task.build_batch(5, np.array([index]))
        for item in (dataset[index], other_size[index], dataset.__getitems__([index] * 2)[1]):
            assert item.keys() == expected.keys()
            assert all(torch.equal(item[name], expected[name][0]) for name in item)


def test_parts_of_a_batch_are_of_its_task() -> None:
    """With gradient accumulation, or several processes, a batch is asked for in parts."""
    dataset = build(batch_size=4)
    whole = dataset.__getitems__([4, 5, 6, 7])
    parts = dataset.__getitems__([4, 5]) + dataset.__getitems__([6, 7])
    for one, other in zip(whole, parts, strict=True):
        assert torch.equal(one["input_ids"], other["input_ids"])


def test_no_example_comes_twice() -> None:
    dataset = RotatingDataset(TASKS[:1], 0, 200, 4)
    rows = {tuple(dataset[index]["input_ids"].tolist()) for index in range(200)}
    assert len(rows) == 200


def test_what_cannot_be_built_is_refused() -> None:
    with pytest.raises(InputError, match="num_examples is 0; ask for at least 1"):
        build(num_examples=0)
    with pytest.raises(ValueError, match=r"batches of different tasks: \[0, 1\]"):
        build().build_batch(np.arange(3, 5))
    with pytest.raises(IndexError, match="item 30 of a dataset of 30"):
        build()[30]


def test_the_first_batches_are_of_the_first_task():
    first, then = AssociativeRecall(4), AssociativeRecall(6)
    dataset = RotatingDataset((then,), 0, 12, 3, first=first, num_first=2)
    for batch in range(4):
        indices = np.arange(3 * batch, 3 * batch + 3)
        expected = (first if batch < 2 else then).build_batch(0, indices)
        assert torch.equal(dataset.build_batch(indices)["input_ids"], expected["input_ids"])
