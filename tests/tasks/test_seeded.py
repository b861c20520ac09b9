"""What holds for every task: pure examples, valid labels, refused numbers."""

import hashlib
import random

import numpy as np
import pytest
import torch

from unimatrix.errors import InputError
from unimatrix.tasks import (
    AssociativeRecall,
    CompositionalRecall,
    MultiQueryRecall,
    Needle,
    NoisyKeys,
    TripleInteraction,
)

TEXT = np.frombuffer(bytes(range(32, 127)) * 10, np.uint8)
TASKS = {
    "associative": (AssociativeRecall(), 128, "ae05cd27f869754a"),
    "mqar": (MultiQueryRecall(64, 8), 64, "4d683f6fca71a56b"),
    "mqar-zero-filler": (MultiQueryRecall(64, 8, random_filler=False), 64, "7a585b47c5adaba5"),
    "mqar-forgetting": (MultiQueryRecall(64, 8, num_rebound=4), 72, "f6243cbcbb57401c"),
    "compositional": (CompositionalRecall(64, 8), 64, "0975a580ab021b6c"),
    "noisy-keys": (NoisyKeys(num_pairs=4, window_tokens=64), 64, "d2825786865702e9"),
    "needle": (Needle(200, TEXT), 200, "24cbdecfd60077e7"),
    "triple": (TripleInteraction(), 49, "8fc2051bd5b84bcc"),
    "triple-lookup": (TripleInteraction("lookup"), 49, "8658d4cc3e0020d5"),
}
EACH = pytest.mark.parametrize("name", TASKS)


@EACH
def test_examples_depend_on_seed_and_index_alone(name):
    task, num_tokens, _ = TASKS[name]
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    first = task.build(7, 40)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = torch.get_rng_state()
    longer = task.build(7, 60)
    order = np.random.default_rng(0).permutation(40)
    shuffled = task.build_batch(7, order)
    for column in ("input_ids", "shift_labels"):
        assert first[column].shape == (40, num_tokens)
        assert first[column].dtype == torch.int64
        assert torch.equal(longer[column][:40], first[column])
        assert torch.equal(shuffled[column], first[column][torch.from_numpy(order)])
    assert torch.equal(torch.get_rng_state(), before)


@EACH
def test_two_seeds_share_no_example(name):
    task, *_ = TASKS[name]
    rows = torch.cat([task.build(seed, 40)["input_ids"] for seed in (7, 8)])
    assert len(torch.unique(rows, dim=0)) == 80


@EACH
def test_ids_and_labels_are_in_the_vocabulary(name):
    task, *_ = TASKS[name]
    batch = task.build(3, 40)
    inputs, labels = batch["input_ids"], batch["shift_labels"]
    assert inputs.min() >= 0
    assert inputs.max() < task.vocab_size
    answers = labels[labels != -100]
    assert answers.min() >= 0
    assert answers.max() < task.vocab_size
    assert (labels != -100).any(1).all()


@EACH
def test_the_examples_of_a_seed_are_the_same_for_ever(name):
    task, _, expected = TASKS[name]
    batch = task.build(7, 64)
    digest = hashlib.sha256(batch["input_ids"].numpy().astype("<i8").tobytes())
    digest.update(batch["shift_labels"].numpy().astype("<i8").tobytes())
    assert digest.hexdigest()[:16] == expected


@EACH
def test_the_dataset_holds_the_built_examples(name):
    task, *_ = TASKS[name]
    dataset, batch = task.dataset(7, 20), task.build(7, 20)
    assert len(dataset) == 20
    assert torch.equal(dataset[19]["input_ids"], batch["input_ids"][19])
    items = dataset.__getitems__([3, 0])
    assert torch.equal(items[1]["shift_labels"], batch["shift_labels"][0])
    with pytest.raises(IndexError, match="20"):
        dataset[20]


@EACH
def test_numbers_out_of_range_are_refused(name):
    task, *_ = TASKS[name]
    with pytest.raises(InputError, match="seed -1"):
        task.build(-1, 4)
    for refuse in (task.build, task.dataset):
        with pytest.raises(InputError, match="num_examples is 0; ask for at least 1"):
            refuse(0, 0)
