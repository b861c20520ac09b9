"""The base of every task: examples that are a pure function of (task, seed, index)."""

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from unimatrix.data.indexed import IndexedDataset
from unimatrix.errors import InputError

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
        if num_examples < 1:
            raise InputError(f"num_examples is {num_examples}; ask for at least 1.")
        return self.build_batch(seed, np.arange(num_examples, dtype=np.int64))

    def dataset(self, seed: int, num_examples: int) -> "TaskDataset":
        """Return examples 0..n-1 of a seed as a map-style dataset, built when asked for."""
        return TaskDataset(self, seed, num_examples)


class TaskDataset(IndexedDataset):
    """The examples of one seed by index; see ``SeededTask.dataset``."""

    def __init__(self, task: SeededTask, seed: int, num_examples: int) -> None:
        if num_examples < 1:
            raise InputError(f"num_examples is {num_examples}; ask for at least 1.")
        self.task = task
        self.seed = seed
        self._num_examples = num_examples

    def __len__(self) -> int:
        return self._num_examples

    def build_batch(self, indices: NDArray[np.int64]) -> dict[str, Tensor]:
        """Build the examples of ``indices`` [n]: ``{name: [n, T] int64}``."""
        return self.task.build_batch(self.seed, indices)
