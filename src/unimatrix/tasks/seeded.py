"""The base of every task: examples that are a pure function of (task, seed, index)."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unimatrix.data.indexed import IndexedDataset
from unimatrix.errors import InputError
from unimatrix.tokenization import BOS_ID

IGNORED_LABEL = -100


class SeededTask(ABC):
    """A task makes ``{"input_ids", "shift_labels"}``, both [n, T] int64, from a seed and indices.

    The label of a position sits on that position, -100 where there is none.
    """

    vocab_size: ClassVar[int]
    """V, of the inputs and of the labels."""

    @abstractmethod
    def build_batch(self, seed: int, indices: NDArray[np.int64]) -> dict[str, Tensor]:
        """Build chosen examples; each is a pure function of (task, seed, index).

        Args:
            seed: >= 0; two seeds share no examples but by chance.
            indices: [n] int64, >= 0, in any order.

        Returns:
            ``input_ids`` [n, T] int64 and ``shift_labels`` [n, T] int64.

        Raises:
            InputError: ``seed`` is negative.
        """

    def build(self, seed: int, num_examples: int) -> dict[str, Tensor]:
        """Build examples 0..n-1 of a seed: ``{"input_ids", "shift_labels"}``, each [n, T] int64."""
        _require_examples(num_examples)
        return self.build_batch(seed, np.arange(num_examples, dtype=np.int64))

    def dataset(self, seed: int, num_examples: int) -> "RotatingDataset":
        """Return examples 0..n-1 of a seed as a map-style dataset, built when asked for."""
        return RotatingDataset([self], seed, num_examples, batch_size=1)


class RotatingDataset(IndexedDataset):
    """Examples of several tasks: batch s is of task s modulo their number, so shapes agree in it.

    Args:
        tasks: at least one, of one vocabulary.
        seed: of the examples; item i is example i of its task.
        num_examples: how many items.
        batch_size: consecutive items of one task.
        first: a task that has all of the first batches; ``None`` is none.
        num_first: how many those are.
    """

    def __init__(
        self,
        tasks: Sequence[SeededTask],
        seed: int,
        num_examples: int,
        batch_size: int,
        *,
        first: SeededTask | None = None,
        num_first: int = 0,
    ) -> None:
        _require_examples(num_examples)
        self.tasks = tuple(tasks)
        self.seed = seed
        self.batch_size = batch_size
        self.first = first
        self.num_first = 0 if first is None else num_first
        self._num_examples = num_examples

    def __len__(self) -> int:
        return self._num_examples

    def build_batch(self, indices: NDArray[np.int64]) -> dict[str, Tensor]:
        """Build the items of ``indices`` [n], which are all of one batch."""
        batches = indices // self.batch_size
        # The number after those of the tasks stands for the first task.
        numbers = np.where(batches < self.num_first, len(self.tasks), batches % len(self.tasks))
        found = np.unique(numbers)
        if len(found) > 1:
            raise ValueError(f"items of batches of different tasks: {found.tolist()}")
        number = int(found[0])
        task = self.first if number == len(self.tasks) else self.tasks[number]
        assert task is not None
        return task.build_batch(self.seed, indices)


def label_positions(
    input_ids: NDArray[np.int64], positions: NDArray[np.int64], answers: NDArray[np.int64]
) -> dict[str, Tensor]:
    """Return ``input_ids`` and ``shift_labels`` [n, T] as tensors, -100 where there is no label.

    Args:
        input_ids: [n, T] int64.
        positions: [n, K] or [1, K] int64, the positions that have a label.
        answers: [n, K] int64, their labels.
    """
    labels = np.full_like(input_ids, IGNORED_LABEL)
    np.put_along_axis(labels, positions, answers, axis=1)
    return {"input_ids": torch.from_numpy(input_ids), "shift_labels": torch.from_numpy(labels)}


def split_answer(documents: NDArray[np.uint8], num_answer_bytes: int) -> dict[str, Tensor]:
    """Turn documents of bytes into inputs, BOS in front, and labels for their last bytes.

    Args:
        documents: [n, T] uint8.
        num_answer_bytes: how many bytes at the end are the answer.

    Returns:
        ``input_ids`` [n, T] int64: BOS and all bytes but the last. ``shift_labels`` [n, T] int64:
        the bytes of the documents on the last ``num_answer_bytes`` positions, -100 before them.
    """
    num_rows, num_tokens = documents.shape
    first = np.full((num_rows, 1), BOS_ID, np.int64)
    input_ids = np.concatenate([first, documents[:, :-1]], axis=1)
    positions = np.arange(num_tokens - num_answer_bytes, num_tokens)[None]
    return label_positions(input_ids, positions, documents[:, -num_answer_bytes:].astype(np.int64))


def require_room(
    num_pairs: int, most_pairs: int, window_tokens: int, shortest: int, *, what: str = "pairs"
) -> None:
    """Raise ``InputError`` unless there are 1 to ``most_pairs`` pairs, and they fit the window."""
    if not 1 <= num_pairs <= most_pairs:
        raise InputError(f"num_pairs is {num_pairs}; choose 1 to {most_pairs}.")
    if window_tokens < shortest:
        raise InputError(
            f"window_tokens is {window_tokens}, too short for {num_pairs} {what}; choose at least "
            f"{shortest}."
        )


def _require_examples(num_examples: int) -> None:
    if num_examples < 1:
        raise InputError(f"num_examples is {num_examples}; ask for at least 1.")
