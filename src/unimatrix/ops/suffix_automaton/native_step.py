"""The suffix automaton of a stream that goes on token by token, in place and without copies."""

import numpy as np

from unimatrix.ops.suffix_automaton.native import (
    EDGES_NEEDED,
    NODES_NEEDED,
    NUM_PREDICTED,
    SPLAY_LENGTH,
    _grow_index,
    _reserve_tokens,
    _scan_rows,
)
from unimatrix.ops.suffix_automaton.storage import NUM_HELD, AutomatonState, copy_automaton


class AutomatonStream:
    """An automaton to which one token of every row is pushed at a time.

    Equation: E10, as ``predict_from_suffix``.

    Args:
        automaton: contiguous and on the CPU; changed in place or outgrown, so the caller gives it
            up.

    Attributes:
        carried: what the automaton has become.
        predicted_ids: [B, 1] int64 after the last token, -1 for no match; overwritten by the next.
        match_lengths: [B, 1] int64, 0 for no match; likewise.
    """

    def __init__(self, automaton: AutomatonState) -> None:
        batch = automaton.counters.shape[0]
        self.predicted_ids = np.full((batch, 1), -1, dtype=np.int64)
        self.match_lengths = np.zeros((batch, 1), dtype=np.int64)
        self._lengths = np.ones(batch, dtype=np.int64)
        self._progress = np.zeros((batch, 4), dtype=np.int64)
        self._hold(automaton)

    def _hold(self, automaton: AutomatonState) -> None:
        self.carried = automaton
        self._arrays = [tensor.numpy() for tensor in automaton]
        self._room = automaton.tokens.shape[1] - int(automaton.counters[:, NUM_HELD].max())

    def push(self, token_ids: np.ndarray[tuple[int], np.dtype[np.int64]]) -> None:
        """Predict after one more token of every row.

        Args:
            token_ids: [B] int64.
        """
        if self._room == 0:
            self._hold(_reserve_tokens(self.carried, 1))
        self._room -= 1
        self.predicted_ids.fill(-1)
        self.match_lengths.fill(0)
        progress = self._progress
        progress.fill(0)
        call = (token_ids.reshape(-1, 1), self._lengths, self.predicted_ids, self.match_lengths)
        while True:
            _scan_rows(0, len(token_ids), *call, progress, *self._arrays, SPLAY_LENGTH)
            predicted = progress[:, NUM_PREDICTED]
            if predicted[0] and (len(predicted) == 1 or predicted.all()):
                return
            num_nodes = int(progress[:, NODES_NEEDED].max())
            num_edges = int(progress[:, EDGES_NEEDED].max())
            room = self._room
            self._hold(_grow_index(self.carried, num_nodes, num_edges))
            self._room = room

    def copy(self) -> AutomatonState:
        """Return a copy of the automaton that shares nothing."""
        return copy_automaton(self.carried)
