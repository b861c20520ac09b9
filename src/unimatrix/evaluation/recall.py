"""Accuracy on the labelled positions of a recall task."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from unimatrix.errors import InputError
from unimatrix.inference.suspend_training import suspend_training
from unimatrix.modeling import UniMatrixForCausalLM
from unimatrix.tasks.seeded import IGNORED_LABEL, SeededTask

STREAM_TOKENS = 2048
"""Tokens of all rows together in one forward pass over longer examples, whose cache is carried."""


def measure_recall(
    model: PreTrainedModel,
    task: SeededTask,
    num_examples: int,
    seed: int,
    *,
    batch_size: int = 32,
    whole_answer: bool = False,
) -> float:
    """Return the mean over examples of the fraction of labels with the largest logit.

    Args:
        model: a causal language model of the task's vocabulary; its mode is restored afterwards.
            A UniMatrix reads long examples in pieces, in constant memory.
        num_examples: examples 0..n-1 of the seed.
        seed: another than in training, since equal seeds make equal examples.
        batch_size: examples in one forward pass; the result does not depend on it.
        whole_answer: an example counts only if all its labels are right.

    Raises:
        InputError: if a number is below 1.
    """
    for name, value in (("num_examples", num_examples), ("batch_size", batch_size)):
        if value < 1:
            raise InputError(f"{name} is {value}; it must be at least 1")
    total = 0.0
    with suspend_training(model):
        for start in range(0, num_examples, batch_size):
            indices = np.arange(start, min(start + batch_size, num_examples), dtype=np.int64)
            shares = _judge_batch(model, task, seed, indices)
            total += float((shares == 1).sum() if whole_answer else shares.sum())
    return total / num_examples


def _judge_batch(
    model: PreTrainedModel, task: SeededTask, seed: int, indices: NDArray[np.int64]
) -> Tensor:
    """Return the fraction of labels that are right in each example, [n] float64."""
    batch = {name: part.to(model.device) for name, part in task.build_batch(seed, indices).items()}
    ids, labels = batch["input_ids"], batch["shift_labels"]
    has_label = labels != IGNORED_LABEL  # [n, T]
    right = torch.zeros(labels.shape, dtype=torch.float64, device=labels.device)
    right[has_label] = (_answer(model, ids, has_label) == labels[has_label]).double()
    return right.sum(dim=1) / has_label.sum(dim=1)


def _answer(model: PreTrainedModel, ids: Tensor, has_label: Tensor) -> Tensor:
    """Return the token with the largest logit at each position in ``has_label``, row by row."""
    if not isinstance(model, UniMatrixForCausalLM):
        answers: Tensor = model(input_ids=ids, use_cache=False).logits[has_label].argmax(dim=-1)
        return answers
    predicted = torch.zeros_like(ids)
    cache = None
    # Pieces that fit a core's cache are read 1.5 times as fast as larger ones.
    num_tokens = max(STREAM_TOKENS // ids.shape[0], 1)
    if model.config.associative_memory == "indexed":
        # Each call makes the keys of the window anew.
        num_tokens = max(num_tokens, (model.config.automaton_window or 0) // 4)
    for start in range(0, ids.shape[1], num_tokens):
        piece = slice(start, start + num_tokens)
        is_last = piece.stop >= ids.shape[1]
        output = model(
            input_ids=ids[:, piece].contiguous(),
            past_key_values=cache,
            use_cache=not is_last,
            logits_at=has_label[:, piece],
        )
        cache = output.past_key_values
        predicted[:, piece][has_label[:, piece]] = output.logits.argmax(dim=-1)
    return predicted[has_label]
