import pytest
import torch

from unimatrix.errors import InputError
from unimatrix.tasks import MultiQueryRecall

KEYS, VALUES = set(range(1, 4096)), set(range(4096, 8192))


def read_example(task, inputs, labels):
    """Return the pairs in order, the pairs bound again, and the questions ``{position: key}``."""
    end = 2 * task.num_pairs
    late = end + 2 * task.num_rebound
    pairs = list(zip(inputs[0:end:2], inputs[1:end:2], strict=True))
    again = list(zip(inputs[end:late:2], inputs[end + 1 : late : 2], strict=True))
    asked = {t: inputs[t] for t, label in enumerate(labels) if label != -100}
    assert all(t >= late and (t - late) % 2 == 0 for t in asked)
    return pairs, again, asked


@pytest.mark.parametrize("random_filler", [True, False])
@pytest.mark.parametrize(
    ("num_tokens", "num_pairs", "num_rebound"),
    [(4, 1, 0), (64, 4, 0), (64, 16, 0), (65, 16, 4), (16, 4, 4), (128, 32, 4)],
)
def test_every_key_is_bound_first_and_asked_once(num_tokens, num_pairs, num_rebound, random_filler):
    task = MultiQueryRecall(num_tokens, num_pairs, random_filler, num_rebound)
    batch = task.build(0, 50)
    assert task.num_tokens == num_tokens + 2 * num_rebound == batch["input_ids"].shape[1]
    for inputs, labels in zip(
        batch["input_ids"].tolist(), batch["shift_labels"].tolist(), strict=True
    ):
        pairs, again, asked = read_example(task, inputs, labels)
        keys, values = [k for k, _ in pairs], [v for _, v in pairs + again]
        assert set(keys) <= KEYS
        assert set(values) <= VALUES
        assert len(set(keys)) == num_pairs
        assert len(set(values)) == num_pairs + num_rebound
        assert len({k for k, _ in again} & set(keys)) == num_rebound
        assert sorted(asked.values()) == sorted(keys)
        last_value = dict(pairs + again)
        assert all(labels[t] == last_value[key] for t, key in asked.items())
        if not random_filler:
            filler = set(range(2 * (num_pairs + num_rebound), task.num_tokens)) - set(asked)
            assert {inputs[t] for t in filler} <= {0}


def test_grids_differ_in_filler_alone():
    random_filler = MultiQueryRecall(64, 8).build(5, 20)
    zero_filler = MultiQueryRecall(64, 8, random_filler=False).build(5, 20)
    assert torch.equal(random_filler["shift_labels"], zero_filler["shift_labels"])
    kept = zero_filler["input_ids"] != 0
    assert torch.equal(random_filler["input_ids"][kept], zero_filler["input_ids"][kept])
    assert (kept.sum(1) == 3 * 8).all()


def test_random_filler_is_uniform_over_the_whole_vocabulary():
    batch = MultiQueryRecall(256, 4).build(1, 1000)
    filler = batch["input_ids"][:, 8:][batch["shift_labels"][:, 8:] == -100]
    counts = torch.bincount(filler // 256, minlength=32)
    expected = len(filler) / 32
    assert len(counts) == 32
    assert (counts - expected).abs().max() < 6 * expected**0.5


def test_the_answer_is_not_put_after_its_question():
    batch = MultiQueryRecall(64, 4).build(2, 2000)
    inputs, labels = batch["input_ids"], batch["shift_labels"]
    after = inputs[:, 1:][labels[:, :-1] != -100]
    answers = labels[:, :-1][labels[:, :-1] != -100]
    assert (after == answers).double().mean() < 0.005


def test_early_gaps_are_asked_most():
    labels = MultiQueryRecall(64, 4).build(3, 4000)["shift_labels"][:, 8::2]
    asked = (labels != -100).double().mean(0)
    # numpy's choice without replacement, 40,000 draws of 4 gaps of 28: 0.718 and 0.045.
    assert abs(asked[0] - 0.718) < 0.04
    assert abs(asked[27] - 0.045) < 0.02
    assert asked[0] > asked[1] > asked[3] > asked[9] > asked[27]


def test_any_pair_may_be_rebound():
    task = MultiQueryRecall(64, 8, num_rebound=2)
    inputs = task.build(4, 4000)["input_ids"]
    places = (inputs[:, 0:16:2, None] == inputs[:, None, 16:20:2]).int().argmax(1)  # [n, 2]
    for place in places.T:
        counts = torch.bincount(place, minlength=8)
        assert (counts - 500).abs().max() < 6 * 500**0.5


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"num_pairs": 0}, "num_pairs is 0; choose 1 to 4095"),
        ({"num_pairs": 4096}, "num_pairs is 4096; choose 1 to 4095"),
        ({"num_pairs": 17}, "window_tokens is 64, too short for 17 pairs; choose at least 68"),
        ({"num_pairs": 4, "num_rebound": 5}, "num_rebound is 5; choose 0 to 4"),
        ({"num_pairs": 4, "num_rebound": -1}, "num_rebound is -1; choose 0 to 4"),
        ({"num_pairs": 4095, "num_rebound": 2}, "num_rebound is 2; choose 0 to 1"),
    ],
)
def test_bad_arguments_are_refused(arguments, named):
    with pytest.raises(InputError, match=named):
        MultiQueryRecall(64, **arguments)
