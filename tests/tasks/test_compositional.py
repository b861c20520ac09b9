from collections import Counter

import pytest
import torch

from unimatrix.errors import InputError
from unimatrix.tasks import CompositionalRecall


@pytest.mark.parametrize("num_pairs", [4, 6, 7, 8, 9, 10, 16, 17, 31, 64])
@pytest.mark.parametrize("extra", [0, 1, 20])
def test_every_key_is_two_ids_with_several_partners_and_asked_once(num_pairs, extra):
    task = CompositionalRecall(5 * num_pairs + extra, num_pairs)
    batch = task.build(0, 20)
    end = 3 * num_pairs
    for inputs, labels in zip(
        batch["input_ids"].tolist(), batch["shift_labels"].tolist(), strict=True
    ):
        first, second, values = (inputs[place:end:3] for place in range(3))
        assert all(1 <= a < 2048 <= b < 4096 for a, b in zip(first, second, strict=True))
        assert all(4096 <= value < 8192 for value in values)
        assert len(set(values)) == num_pairs
        bindings = dict(zip(zip(first, second, strict=True), values, strict=True))
        assert len(bindings) == num_pairs
        partners = [*Counter(first).values(), *Counter(second).values()]
        assert 2 <= min(partners) <= max(partners) <= min(partners) + 1
        asked = [t for t, label in enumerate(labels) if label != -100]
        assert all(t > end and (t - end) % 2 == 1 for t in asked)
        questions = [(inputs[t - 1], inputs[t]) for t in asked]
        assert sorted(questions) == sorted(bindings)
        assert [labels[t] for t in asked] == [bindings[key] for key in questions]


def test_pairs_stand_in_random_order():
    inputs = CompositionalRecall(40, 8).build(1, 4000)["input_ids"]
    same_first = (inputs[:, 0] == inputs[:, 3]).double().mean()
    # Cells 3 + 3 + 2 of a 3 x 3 grid: 7 of the 28 pairs of cells share the first id.
    assert abs(same_first - 7 / 28) < 6 * (0.25 * 0.75 / 4000) ** 0.5


def test_filler_is_uniform_over_the_whole_vocabulary():
    batch = CompositionalRecall(256, 4).build(1, 1000)
    asked = batch["shift_labels"] != -100
    filler = batch["input_ids"][:, 12:-1][~(asked[:, 12:-1] | asked[:, 13:])]
    counts = torch.bincount(filler // 256, minlength=32)
    expected = len(filler) / 32
    assert len(counts) == 32
    assert (counts - expected).abs().max() < 6 * expected**0.5


def test_early_gaps_are_asked_most():
    labels = CompositionalRecall(68, 4).build(3, 4000)["shift_labels"][:, 13::2]
    asked = (labels != -100).double().mean(0)
    # numpy's choice without replacement, 40,000 draws of 4 gaps of 28: 0.718 and 0.045.
    assert abs(asked[0] - 0.718) < 0.04
    assert abs(asked[27] - 0.045) < 0.02
    assert asked[0] > asked[1] > asked[3] > asked[9] > asked[27]


@pytest.mark.parametrize(
    ("num_tokens", "num_pairs", "named"),
    [
        (64, 3, "num_pairs is 3; choose 4, or 6 to 4096"),
        (64, 5, "num_pairs is 5; choose 4, or 6 to 4096"),
        (64, 4097, "num_pairs is 4097; choose 4, or 6 to 4096"),
        (39, 8, "window_tokens is 39, too short for 8 pairs; choose at least 40"),
    ],
)
def test_bad_arguments_are_refused(num_tokens, num_pairs, named):
    with pytest.raises(InputError, match=named):
        CompositionalRecall(num_tokens, num_pairs)
