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
    """

    def __init__(
        self, tasks: Sequence[SeededTask], seed: int, num_examples: int, batch_size: int
    ) -> None:
        if num_examples < 1:
            raise InputError(f"num_examples is {num_examples}; ask for at least 1.")
        self.tasks = tuple(tasks)
        self.seed = seed
        self.batch_size = batch_size
        self._num_examples = num_examples

    def __len__(self) -> int:
        return self._num_examples

    def build_batch(self, indices: NDArray[np.int64]) -> dict[str, Tensor]:
        """Build the items of ``indices`` [n], which are all of one batch."""
        numbers = np.unique(indices // self.batch_size % len(self.tasks))
        if len(numbers) > 1:
            raise ValueError(f"items of batches of different tasks: {numbers.tolist()}")
        return self.tasks[int(numbers[0])].build_batch(self.seed, indices)
