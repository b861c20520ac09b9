"""Several tasks in turn, a batch each."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from unimatrix.data.indexed import IndexedDataset
from unimatrix.errors import InputError
from unimatrix.tasks.seeded import SeededTask


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
        if num_examples < 1:
            raise InputError(f"num_examples is {num_examples}; ask for at least 1.")
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
        # The first task stands behind the others.
        numbers = np.where(batches < self.num_first, len(self.tasks), batches % len(self.tasks))
        found = np.unique(numbers)
        if len(found) > 1:
            raise ValueError(f"items of batches of different tasks: {found.tolist()}")
        number = int(found[0])
        task = self.first if number == len(self.tasks) else self.tasks[number]
        assert task is not None
        return task.build_batch(self.seed, indices)
