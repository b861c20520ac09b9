"""Windows of which a share are a task's documents, and the others are cut from a text."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unimatrix.data import WindowDataset
from unimatrix.data.counter_random import draw_words
from unimatrix.data.indexed import IndexedDataset
from unimatrix.errors import InputError
from unimatrix.tasks.seeded import SeededTask


class MixedWindows(IndexedDataset):
    """Items of a text and of a task; item i is a pure function of (text, task, share, seed, i).

    Args:
        windows: of the text, whose seed and length are those of the mixture.
        task: of windows as long as those of the text.
        share: of the items that are the task's, 0 to 1.

    Raises:
        InputError: if the windows have predictions of an automaton, which documents have not.
    """

    def __init__(self, windows: WindowDataset, task: SeededTask, share: float) -> None:
        if windows.matches is not None:
            raise InputError(
                "documents do not continue a text, so no automaton has read what comes before "
                "them; leave data.carried_automaton or data.document_share out"
            )
        self.windows, self.task, self.share = windows, task, share

    def __len__(self) -> int:
        return len(self.windows)

    def build_batch(self, indices: NDArray[np.int64]) -> dict[str, Tensor]:
        """Build the items of ``indices`` [n]: ``{name: [n, T]}``."""
        # The first word of an item says where its window begins, or seeds its document.
        words = draw_words(self.windows.seed, indices, 2)[:, 1]
        is_document = words < np.uint64(int(self.share * 2**53)) << np.uint64(11)
        if self.share == 1:
            is_document[:] = True
        parts = []
        if not is_document.all():
            parts.append((~is_document, self.windows.build_batch(indices[~is_document])))
        if is_document.any():
            built = self.task.build_batch(self.windows.seed, indices[is_document])
            parts.append((is_document, built))
        shape = (len(indices), self.windows.window_tokens)
        # What the task alone has, the weights in the loss, is 1 in a text.
        columns = {name: column for _, built in parts for name, column in built.items()}
        batch = {name: torch.ones(shape, dtype=columns[name].dtype) for name in columns}
        for rows, built in parts:
            for name, column in built.items():
                batch[name][torch.from_numpy(rows)] = column
        return batch
