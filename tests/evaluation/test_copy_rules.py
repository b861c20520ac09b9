import numpy as np
import pytest
import torch

from unimatrix.errors import InputError
from unimatrix.evaluation.copy_rules import (
    COPY_RULES,
    measure_copy_rules,
    predict_after_first_match,
    predict_after_last_match,
    predict_by_suffix_automaton,
)
from unimatrix.tasks import (
    CompositionalRecall,
    MultiQueryRecall,
    NoisyKeys,
    SeededTask,
    TripleInteraction,
)


def follow(row, pick):
    """Return, by searching, the token after the earlier occurrence that ``pick`` chooses."""
    predicted = []
    for t, token in enumerate(row):
        matches = [j for j in range(t) if row[j] == token]
        predicted.append(row[pick(matches) + 1] if matches else -1)
    return predicted


def test_rules_on_a_row_checked_by_hand():
    row = torch.tensor([[1, 2, 3, 1, 2, 4, 2, 3, 1, 2]])
    assert predict_after_last_match(row).tolist() == [[-1, -1, -1, 2, 3, -1, 4, 1, 2, 3]]
    assert predict_after_first_match(row).tolist() == [[-1, -1, -1, 2, 3, -1, 3, 1, 2, 3]]
    assert predict_by_suffix_automaton(row).tolist() == [[-1, -1, -1, 2, 3, -1, 4, 1, 2, 4]]


@pytest.mark.parametrize("vocab_size", [1, 2, 10, 1000])
@pytest.mark.parametrize("num_tokens", [1, 2, 40])
def test_matches_are_those_a_search_finds(vocab_size, num_tokens):
    rows = torch.from_numpy(np.random.default_rng(0).integers(vocab_size, size=(5, num_tokens)))
    for predict, pick in ((predict_after_last_match, max), (predict_after_first_match, min)):
        assert predict(rows).tolist() == [follow(row, pick) for row in rows.tolist()]


class TwoExamples(SeededTask):
    """Example 0 has one label, which the last match meets; example 1 has two, and it meets one."""

    def build_batch(self, seed, indices):
        inputs = torch.tensor([[1, 2, 1, 3, 1], [1, 2, 1, 3, 1]])
        labels = torch.tensor([[-100, -100, -100, -100, 3], [-100, -100, 2, -100, 2]])
        return {"input_ids": inputs[indices], "shift_labels": labels[indices]}


def test_accuracy_is_the_mean_over_examples_of_the_mean_over_labels():
    expected = {"after_last_match": 0.75, "after_first_match": 0.5, "suffix_automaton": 0.75}
    for batch_size in (1, 2, 5):
        assert measure_copy_rules(TwoExamples(), 2, 0, batch_size=batch_size) == expected
    assert measure_copy_rules(TwoExamples(), 1, 0)["after_last_match"] == 1.0
    assert list(expected) == list(COPY_RULES)


def test_plain_mqar_rewards_the_first_match():
    scores = measure_copy_rules(MultiQueryRecall(1024, 256), 100, 0)
    assert scores["after_first_match"] == 1.0
    assert abs(scores["after_last_match"] - 0.985) < 0.01
    assert abs(scores["suffix_automaton"] - 0.985) < 0.01


def test_zero_filler_lets_every_rule_pass():
    scores = measure_copy_rules(MultiQueryRecall(256, 64, random_filler=False), 20, 0)
    assert set(scores.values()) == {1.0}


def test_forgetting_rewards_the_last_match():
    scores = measure_copy_rules(MultiQueryRecall(64, 16, num_rebound=4), 100, 0)
    assert scores["after_first_match"] == 12 / 16
    assert scores["after_last_match"] > 0.99
    assert measure_copy_rules(MultiQueryRecall(64, 4, num_rebound=4), 50, 0)[
        "after_first_match"
    ] == pytest.approx(0)


def test_compositional_keys_need_both_ids():
    scores = measure_copy_rules(CompositionalRecall(128, 16), 100, 0)
    assert scores["suffix_automaton"] > 0.99
    # The first pair of each b, 4 of the 16.
    assert scores["after_first_match"] == 4 / 16
    assert scores["after_last_match"] < 0.1


def test_no_rule_reads_noisy_keys_or_triples_exactly():
    noisy = measure_copy_rules(NoisyKeys(), 200, 0)
    assert noisy["after_last_match"] < noisy["after_first_match"] < noisy["suffix_automaton"] < 0.95
    assert set(measure_copy_rules(TripleInteraction(), 50, 0).values()) == {0.0}


@pytest.mark.parametrize("numbers", [{"num_examples": 0}, {"num_examples": 1, "batch_size": 0}])
def test_numbers_below_1_are_refused(numbers):
    with pytest.raises(InputError, match="must be at least 1"):
        measure_copy_rules(TwoExamples(), seed=0, **numbers)
