import pytest
import torch

from tests.models import SMALL
from unimatrix.configuration import UniMatrixConfig
from unimatrix.errors import InputError
from unimatrix.evaluation.recall import measure_recall
from unimatrix.modeling import UniMatrixForCausalLM
from unimatrix.tasks import AssociativeRecall

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
