from types import SimpleNamespace

import pytest
import torch

from tests.models import SMALL, VARIANTS, build_model, draw_ids
from unimatrix.configuration import UniMatrixConfig
from unimatrix.errors import InputError
from unimatrix.evaluation import recall
from unimatrix.evaluation.recall import measure_recall
from unimatrix.modeling import UniMatrixForCausalLM
from unimatrix.tasks import AssociativeRecall, SeededTask

TASK = AssociativeRecall(num_pairs=3, window_tokens=24)


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = UniMatrixConfig.preset("sparsepointer", **(SMALL | {"vocab_size": 64}))
        return UniMatrixForCausalLM(config).eval()


def test_counts_right_answers_at_the_last_position(model) -> None:
    examples = TASK.build(5, 50)
    with torch.no_grad():
        answers = model(examples["input_ids"]).logits[:, -1].argmax(-1)
    right = int((answers == examples["shift_labels"][:, -1]).sum())
    assert measure_recall(model, TASK, 50, 5) == right / 50


def test_a_perfect_and_a_hopeless_answer(model) -> None:
    class Known:
        def __init__(self, offset):
            self.offset = offset

        def build_batch(self, seed, indices):
            batch = TASK.build_batch(seed, indices)
            with torch.no_grad():
                answers = model(batch["input_ids"]).logits[:, -1].argmax(-1)
            batch["shift_labels"][:, -1] = answers + self.offset
            return batch

    assert measure_recall(model, Known(0), 20, 1) == 1.0
    assert measure_recall(model, Known(1), 20, 1) == 0.0


def test_batches_and_global_generators_do_not_move_it(model) -> None:
    expected = measure_recall(model, TASK, 37, 5)
    for salt, batch_size in enumerate((1, 8, 64)):
        torch.manual_seed(salt)
        assert measure_recall(model.train(), TASK, 37, 5, batch_size=batch_size) == expected
        assert model.training
    model.eval()


@pytest.mark.parametrize("numbers", [{"num_examples": 0}, {"num_examples": 1, "batch_size": 0}])
def test_numbers_below_1(model, numbers) -> None:
    with pytest.raises(InputError, match="must be at least 1"):
        measure_recall(model, TASK, seed=0, **numbers)


class Scripted(torch.nn.Module):
    """A model that answers every token with the next one of the vocabulary."""

    device = torch.device("cpu")

    def forward(self, input_ids, use_cache):
        assert not use_cache
        logits = torch.nn.functional.one_hot((input_ids + 1) % 16, 16).float()
        return SimpleNamespace(logits=logits)


class Labelled(SeededTask):
    """Examples with labels of which the scripted answers get chosen ones right.

    Args:
        right: one row an example, of whether each of its labels is what the script answers.
    """

    vocab_size = 16

    def __init__(self, right):
        self.right = right

    def build_batch(self, seed, indices):
        ids = torch.arange(12).repeat(len(indices), 1)
        labels = torch.full_like(ids, -100)
        for row, index in enumerate(indices):
            for number, is_right in enumerate(self.right[index]):
                labels[row, 3 * number] = ids[row, 3 * number] + (1 if is_right else 2)
        return {"input_ids": ids, "shift_labels": labels}


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_an_example_counts_by_the_share_of_its_labels_or_as_a_whole(batch_size) -> None:
    """The mean is over examples: one with many labels weighs no more than one with a single."""
    task = Labelled([[True], [True, False, True, False], [False, False], [True, True, True]])
    shares = measure_recall(Scripted(), task, 4, 0, batch_size=batch_size)
    assert shares == pytest.approx((1 + 0.5 + 0 + 1) / 4)
    whole = measure_recall(Scripted(), task, 4, 0, batch_size=batch_size, whole_answer=True)
    assert whole == 2 / 4


@pytest.mark.parametrize("whole_answer", [False, True])
def test_a_perfect_and_a_wrong_model(whole_answer) -> None:
    for is_right in (True, False):
        task = Labelled([[is_right] * 4] * 5)
        found = measure_recall(Scripted(), task, 5, 0, whole_answer=whole_answer)
        assert found == float(is_right)


@pytest.mark.parametrize("stream_tokens", [1, 14, 32, 66])
@pytest.mark.parametrize("variant", VARIANTS)
def test_pieces_give_the_answers_of_one_pass(monkeypatch, variant, stream_tokens) -> None:
    """Labels at every third position are what the model answers in one pass over the example."""
    model = build_model(variant)
    ids = draw_ids(3, 32)
    with torch.no_grad():
        answers = model(ids, use_cache=False).logits.argmax(dim=-1)
    labels = answers.where(torch.arange(32) % 3 == 0, -100)
    if stream_tokens == 14:  # for two rows
        labels[:, 7:14] = -100  # a piece in which nothing is asked

    class Known(SeededTask):
        vocab_size = 23

        def build_batch(self, seed, indices):
            return {"input_ids": ids[indices], "shift_labels": labels[indices]}

    monkeypatch.setattr(recall, "STREAM_TOKENS", stream_tokens)
    sizes = []
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    assert measure_recall(model, Known(), 3, 0, batch_size=2, whole_answer=True) == 1.0
    handle.remove()
    # An index makes the keys of its window in every call, so calls are longer.
    least = model.config.automaton_window // 4 if variant == "unimatrix" else 1
    lengths = [min(max(stream_tokens // rows, least), 32) for rows in (2, 1)]
    assert sizes[0] == (2, lengths[0])
    assert max(length for rows, length in sizes if rows == 1) == lengths[1]
    assert sum(rows * length for rows, length in sizes) == 3 * 32
