import hashlib
import random

import numpy as np
import pytest
import torch

from unimatrix.errors import InputError
from unimatrix.tasks import AssociativeRecall

TASK = AssociativeRecall()
PAIRS = pytest.mark.parametrize("num_pairs", range(1, 9))
NUM_EXAMPLES = 500


def read_sequence(task, inputs):
    """Parse one input by the paper's grammar; return its bindings and the key asked for."""
    assert inputs[0] == 1
    end = 1 + 3 * task.num_pairs
    keys, values, separators = inputs[1:end:3], inputs[2:end:3], inputs[3:end:3]
    assert set(separators) == {2}
    assert set(keys) <= set(range(5, 13))
    assert set(values) <= set(range(13, 21))
    assert len(set(keys)) == len(set(values)) == task.num_pairs
    assert set(inputs[end:-3]) <= set(range(21, 31))
    assert (inputs[-3], inputs[-1]) == (3, 4)
    return dict(zip(keys, values, strict=True)), inputs[-2]


@PAIRS
def test_sequences_follow_the_paper_and_the_label_is_the_bound_value(num_pairs):
    task = AssociativeRecall(num_pairs=num_pairs)
    batch = task.build(19, NUM_EXAMPLES)
    inputs, labels = batch["input_ids"], batch["shift_labels"]
    assert inputs.dtype == labels.dtype == torch.int64
    assert inputs.shape == labels.shape == (NUM_EXAMPLES, 128)
    assert (labels[:, :-1] == -100).all()
    for row, label in zip(inputs.tolist(), labels[:, -1].tolist(), strict=True):
        bindings, asked = read_sequence(task, row)
        assert bindings[asked] == label


@PAIRS
def test_the_answer_stands_in_the_input_once_at_its_binding(num_pairs):
    batch = AssociativeRecall(num_pairs=num_pairs).build(3, NUM_EXAMPLES)
    inputs, answers = batch["input_ids"], batch["shift_labels"][:, -1:]
    found = inputs == answers
    assert (found.sum(1) == 1).all()
    positions = found.int().argmax(1)
    assert (inputs.gather(1, positions[:, None] - 1) == inputs[:, -2:-1]).all()
    # The key is at its binding and in the question, nowhere else.
    assert ((inputs == inputs[:, -2:-1]).sum(1) == 2).all()


@PAIRS
def test_nothing_but_the_binding_tells_the_answer(num_pairs):
    batch = AssociativeRecall(num_pairs=num_pairs).build(5, 8000)
    inputs, answers = batch["input_ids"], batch["shift_labels"][:, -1]
    slots = ((inputs == answers[:, None]).int().argmax(1) - 2) // 3
    # Answers, asked keys and asked places are uniform and independent: 6 standard deviations.
    for values, size in ((answers - 13, 8), (inputs[:, -2] - 5, 8), (slots, num_pairs)):
        counts = torch.bincount(values, minlength=size)
        assert len(counts) == size
        assert (counts - 8000 / size).abs().max() < 6 * (8000 / size) ** 0.5
    table = torch.bincount((inputs[:, -2] - 5) * 8 + answers - 13, minlength=64)
    assert (table - 125).abs().max() < 6 * 125**0.5


def test_filler_is_random_and_covers_its_range():
    filler = TASK.build(0, 2000)["input_ids"][:, 13:-3]
    counts = torch.bincount(filler.flatten(), minlength=31)[21:]
    expected = filler.numel() / 10
    assert (counts - expected).abs().max() < 6 * expected**0.5
    assert len(torch.unique(filler, dim=0)) == 2000


def test_examples_depend_on_seed_and_index_alone():
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    first = TASK.build(7, 64)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = torch.get_rng_state()
    longer = TASK.build(7, 100)
    order = np.random.default_rng(0).permutation(64)
    shuffled = TASK.build_batch(7, order)
    for name in ("input_ids", "shift_labels"):
        assert torch.equal(longer[name][:64], first[name])
        assert torch.equal(shuffled[name], first[name][torch.from_numpy(order)])
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(TASK.build(8, 64)["input_ids"], first["input_ids"])


def test_the_examples_of_a_seed_are_the_same_for_ever():
    batch = TASK.build(7, 64)
    digest = hashlib.sha256(batch["input_ids"].numpy().astype("<i8").tobytes())
    digest.update(batch["shift_labels"].numpy().astype("<i8").tobytes())
    assert digest.hexdigest()[:16] == "ae05cd27f869754a"


def test_the_dataset_holds_the_built_examples():
    dataset = TASK.dataset(7, 50)
    batch = TASK.build(7, 50)
    assert len(dataset) == 50
    assert torch.equal(dataset[49]["input_ids"], batch["input_ids"][49])
    items = dataset.__getitems__([3, 0])
    assert torch.equal(items[1]["shift_labels"], batch["shift_labels"][0])
    with pytest.raises(IndexError, match="50"):
        dataset[50]


def test_chance_is_one_value_in_eight():
    assert TASK.chance_fraction == 0.125
    assert TASK.vocab_size == 64


def test_the_shortest_window_has_no_filler():
    task = AssociativeRecall(num_pairs=8, window_tokens=28)
    for row in task.build(0, 20)["input_ids"].tolist():
        read_sequence(task, row)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: AssociativeRecall(num_pairs=0), "num_pairs is 0.*1 to 8"),
        (lambda: AssociativeRecall(num_pairs=9), "num_pairs is 9.*1 to 8"),
        (lambda: AssociativeRecall(num_pairs=8, window_tokens=27), "27.*at least 28"),
        (lambda: TASK.build(-1, 4), "seed -1"),
        (lambda: TASK.build(0, 0), "num_examples is 0"),
        (lambda: TASK.dataset(0, 0), "num_examples is 0"),
    ],
)
def test_numbers_out_of_range_are_refused(make, named):
    with pytest.raises(InputError, match=named):
        make()
