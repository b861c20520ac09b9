"""Accuracy on the last position, where a recall task asks its question."""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from unimatrix.errors import InputError
from unimatrix.evaluation.modes import suspend_training


class RecallTask(Protocol):
    """A task whose only label is on the last position."""

    def build_batch(self, seed: int, indices: NDArray[np.int64]) -> dict[str, Tensor]:
        """Build ``input_ids`` and ``shift_labels``, both [n, T] int64, of chosen examples."""
        ...


def measure_recall(
    model: PreTrainedModel,
    task: RecallTask,
    num_examples: int,
    seed: int,
    *,
    batch_size: int = 32,
) -> float:
    """Return the fraction of examples whose last label has the largest logit.

    Args:
        model: a causal language model of the task's vocabulary; its mode is restored afterwards.
        task: makes the examples.
        num_examples: examples 0..n-1 of the seed.
        seed: not the one trained with: equal seeds make equal examples.
        batch_size: examples in one forward pass; it does not move the result.

    Raises:
        InputError: if a number is below 1.
    """
    for name, value in (("num_examples", num_examples), ("batch_size", batch_size)):
        if value < 1:
            raise InputError(f"{name} is {value}; it must be at least 1")
    num_right = 0
    with suspend_training(model):
        for start in range(0, num_examples, batch_size):
            indices = np.arange(start, min(start + batch_size, num_examples), dtype=np.int64)
            batch = {n: t.to(model.device) for n, t in task.build_batch(seed, indices).items()}
            output = model(input_ids=batch["input_ids"], use_cache=False, logits_to_keep=1)
            answers = output.logits[:, -1].argmax(dim=-1)  # [B]
            num_right += int((answers == batch["shift_labels"][:, -1]).sum())
    return num_right / num_examples
