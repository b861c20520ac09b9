"""Copying without a parameter: the baseline beside every figure of exact recall."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unimatrix.errors import InputError
from unimatrix.ops.suffix_automaton import predict_from_suffix
from unimatrix.tasks.seeded import IGNORED_LABEL, SeededTask


def predict_after_last_match(input_ids: Tensor) -> Tensor:
    """Predict the token that followed the last earlier occurrence of each token.

    Ids and result are [B, T] int64 on the CPU; the result is -1 where a token is new.
    """
    order, is_new = _group_equal(input_ids)
    previous = np.roll(order, 1, axis=1)
    return _read_next(input_ids, order, np.where(is_new, -1, previous))


def predict_after_first_match(input_ids: Tensor) -> Tensor:
    """Predict the token that followed the first earlier occurrence of each token; as above."""
    order, is_new = _group_equal(input_ids)
    starts = np.maximum.accumulate(np.where(is_new, np.arange(order.shape[1]), 0), axis=1)
    first = np.take_along_axis(order, starts, axis=1)
    return _read_next(input_ids, order, np.where(is_new, -1, first))


def predict_by_suffix_automaton(input_ids: Tensor) -> Tensor:
    """Predict the token that followed the longest suffix that occurred before; as above."""
    (predicted_ids, _), _ = predict_from_suffix(input_ids)
    found: Tensor = predicted_ids
    return found


COPY_RULES: dict[str, Callable[[Tensor], Tensor]] = {
    "after_last_match": predict_after_last_match,
    "after_first_match": predict_after_first_match,
    "suffix_automaton": predict_by_suffix_automaton,
}


def measure_copy_rules(
    task: SeededTask, num_examples: int, seed: int, *, batch_size: int = 32
) -> dict[str, float]:
    """Return the accuracy of every copy rule: the mean over examples of the mean over labels.

    Args:
        num_examples: examples 0..n-1 of the seed.
        seed: >= 0.
        batch_size: examples built at once; it does not move the result.

    Raises:
        InputError: if a number is out of range.
    """
    for name, value in (("num_examples", num_examples), ("batch_size", batch_size)):
        if value < 1:
            raise InputError(f"{name} is {value}; it must be at least 1.")
    scores: dict[str, list[Tensor]] = {name: [] for name in COPY_RULES}
    for start in range(0, num_examples, batch_size):
        indices = np.arange(start, min(start + batch_size, num_examples), dtype=np.int64)
        batch = task.build_batch(seed, indices)
        labels = batch["shift_labels"]
        num_labels = (labels != IGNORED_LABEL).sum(1)
        assert (num_labels > 0).all(), "an example without a label"
        for name, predict in COPY_RULES.items():
            # No rule predicts -100, so what has no label is never right.
            num_right = (predict(batch["input_ids"]) == labels).sum(1)
            scores[name].append(num_right.double() / num_labels)
    return {name: float(torch.cat(parts).mean()) for name, parts in scores.items()}


def _group_equal(input_ids: Tensor) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return positions [B, T] sorted by (token, position), and which are the first of a token."""
    ids = input_ids.numpy()
    order = np.argsort(ids, axis=1, kind="stable")
    ordered = np.take_along_axis(ids, order, axis=1)
    is_new = np.ones(ids.shape, bool)
    is_new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return order, is_new


def _read_next(input_ids: Tensor, order: NDArray[np.int64], matches: NDArray[np.int64]) -> Tensor:
    """Return the token after each match, at the position of ``order`` it belongs to."""
    # A match lies before its own position, so the one after it exists; -1 stands for none.
    following = np.take_along_axis(input_ids.numpy(), matches + 1, axis=1)
    predicted = np.empty_like(following)
    np.put_along_axis(predicted, order, np.where(matches < 0, -1, following), axis=1)
    return torch.from_numpy(predicted)
