"""The text index of a stream that goes on token by token, in place."""

import numpy as np

from unimatrix.ops.text_index.native import _scan_rows
from unimatrix.ops.text_index.state import (
    GAPS,
    NUM_PLACES,
    NUM_TOLD,
    TextIndex,
    copy_index,
    name_units,
)


class IndexStream:
    """An index to which one token of every row is pushed at a time.

    Equation: E25, and E10 as ``predict_from_suffix`` with a window.

    Args:
        index: contiguous and on the CPU; changed in place, so the caller gives it up.

    Attributes:
        carried: the index.
        tokens: [B, W], its tokens, and
        counters: [B, 6] int64, its counters, in the same memory.
        predicted_ids: [B, 1] int64 after the last token, -1 for no match; overwritten by the next.
        match_lengths: [B, 1] int64, 0 for no match; likewise.
        places: [B, 1, 5, 5] int32, as in ``Found``; likewise.
        new_units: [B, 1] int32, as in ``Found``; likewise.
    """

    def __init__(self, index: TextIndex) -> None:
        batch = len(index.tokens)
        self.carried = index
        self.predicted_ids = np.full((batch, 1), -1, dtype=np.int64)
        self.match_lengths = np.zeros((batch, 1), dtype=np.int64)
        self._lengths = np.ones(batch, dtype=np.int64)
        self.places = np.zeros((batch, 1, NUM_PLACES, NUM_TOLD), dtype=np.int32)
        self.new_units = np.zeros((batch, 1), dtype=np.int32)
        self._distances = self.places[..., 0]
        self._no_match = np.array([-1, 0], dtype=np.int64)
        self._matches = np.empty((batch, 1, 2), dtype=np.int64)
        self._arrays = [tensor.numpy() for tensor in index]
        self.tokens, self.counters = index.tokens.numpy(), index.counters.numpy()
        self._gap = GAPS[name_units(index)]

    def push(self, token_ids: np.ndarray[tuple[int], np.dtype[np.int64]]) -> None:
        """Predict after one more token of every row.

        Args:
            token_ids: [B] int64.
        """
        ids = token_ids.reshape(-1, 1)
        np.copyto(self._matches, self._no_match)
        self._distances.fill(-1)
        found = (self.places, self.new_units, self._matches)
        _scan_rows(0, len(ids), ids, self._lengths, *found, *self._arrays, self._gap)
        np.copyto(self.predicted_ids, self._matches[..., 0])
        np.copyto(self.match_lengths, self._matches[..., 1])

    def copy(self) -> TextIndex:
        """Return a copy of the index that shares nothing."""
        return copy_index(self.carried)
