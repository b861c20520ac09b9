"""The base of every dataset of this package: items by index, built a batch at a time."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset


class IndexedDataset(Dataset[dict[str, Tensor]], ABC):
    """A map-style dataset that builds the items of a batch together.

    An item is ``{"input_ids": [T] int64, "shift_labels": [T] int64}``: the label of a position sits
    on that position, -100 where there is none. ``suffix_match`` [T, 2] may stand beside them.
    """

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def build_batch(self, indices: NDArray[np.int64]) -> dict[str, Tensor]:
        """Build the items of ``indices`` [n] as ``{name: [n, T] int64}``."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Tensor]]:
        """Return a batch of items; PyTorch's loader calls this instead of one call an item."""
        array = np.asarray(indices, dtype=np.int64)
        outside = (array < 0) | (array >= len(self))
        if outside.any():
            raise IndexError(f"item {array[outside][0]} of a dataset of {len(self)}")
        columns = {name: rows.unbind(0) for name, rows in self.build_batch(array).items()}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
