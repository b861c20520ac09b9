"""Windows of a byte stream: random ones to train on, consecutive ones to validate on."""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unimatrix.data.byte_stream import ByteStream
from unimatrix.data.counter_random import draw_words
from unimatrix.data.indexed import IndexedDataset
from unimatrix.errors import InputError
from unimatrix.tokenization import BOS_ID

IGNORED_LABEL = -100


class StreamMatches(NamedTuple):
    """What a suffix automaton predicts after every token of a stream, BOS and EOS included.

    Attributes:
        predicted_ids: [n] int16, the id that followed the longest earlier match, -1 for no match.
        match_lengths: [n] int32, 0 for no match.
    """

    predicted_ids: NDArray[np.int16]
    match_lengths: NDArray[np.int32]

    def read(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return id and length after each of ``tokens`` [...], as [..., 2]; none for token -1."""
        known = tokens >= 0
        columns = (
            np.where(known, self.predicted_ids[tokens], -1),
            np.where(known, self.match_lengths[tokens], 0),
        )
        return np.stack(columns, axis=-1).astype(np.int64)


class WindowDataset(IndexedDataset):
    """Cut windows at random starts; item i is a pure function of (stream, T, seed, i).

    Source: paper, byte-level WikiText-2 recipe, with ``leading_bos=False``.

    Args:
        stream: the bytes to cut from.
        window_tokens: T, the positions of a window; each has a label.
        num_windows: the length of the dataset; items are drawn with replacement.
        seed: >= 0.
        leading_bos: True: BOS and T - 1 bytes predict T bytes, so that a window starts as every
            stream does. False: T + 1 tokens of the stream (BOS, bytes, EOS if it has one).
        matches: of the stream; an item then has ``suffix_match`` [T, 2], the predictions of an
            automaton that has read the stream up to each token.

    Raises:
        InputError: the stream is shorter than one window, or a number is out of range.
    """

    def __init__(
        self,
        stream: ByteStream,
        window_tokens: int,
        num_windows: int,
        seed: int,
        *,
        leading_bos: bool = True,
        matches: StreamMatches | None = None,
    ) -> None:
        _check_sizes(window_tokens, num_windows)
        if seed < 0:
            raise InputError(f"seed {seed} is negative; give 0 or more.")
        self.stream = stream
        self.window_tokens = window_tokens
        self.seed = seed
        self.leading_bos = leading_bos
        self.matches = matches
        self._num_windows = num_windows
        room = len(stream) + 1 if leading_bos else stream.num_tokens
        self._num_starts = room - window_tokens
        if self._num_starts < 1:
            raise _explain_too_short(stream, window_tokens)

    def __len__(self) -> int:
        return self._num_windows

    def draw_starts(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return where the windows of ``indices`` [n] start, [n] int64."""
        words = draw_words(self.seed, indices, 1)[:, 0]
        return (words % np.uint64(self._num_starts)).astype(np.int64)

    def build_batch(self, indices: NDArray[np.int64]) -> dict[str, Tensor]:
        """Cut the windows of ``indices`` [n]: ``{name: [n, T] int64}``, and their matches."""
        starts = self.draw_starts(indices)
        places = starts[:, None] + np.arange(self.window_tokens)  # [n, T], tokens of the stream
        if self.leading_bos:
            tokens = np.empty((len(indices), self.window_tokens + 1), np.int64)
            tokens[:, 0] = BOS_ID
            tokens[:, 1:] = self.stream.read_windows(starts, self.window_tokens)
            places[:, 0] = -1  # This BOS is not the stream's.
        else:
            tokens = self.stream.read_token_windows(starts, self.window_tokens + 1)
        batch = _split_labels(tokens)
        if self.matches is not None:
            batch["suffix_match"] = torch.from_numpy(self.matches.read(places))
        return batch


class DocumentWindows(IndexedDataset):
    """Cut windows at random starts, in which every document begins anew.

    A window goes on from one document to the next as the stream does, and each begins with BOS, the
    first one wherever the window starts. Nothing predicts over a document's edge: its last byte has
    no label. Item i is a pure function of (stream, T, seed, i).

    Args:
        stream: the bytes to cut from, of several documents.
        window_tokens: T, the positions of a window.
        num_windows: the length of the dataset; items are drawn with replacement.
        seed: >= 0.

    Raises:
        InputError: the stream is shorter than one window or a single document, or a number is out
            of range.
    """

    def __init__(self, stream: ByteStream, window_tokens: int, num_windows: int, seed: int) -> None:
        # Bytes are drawn as for windows of one text.
        self._cut = WindowDataset(stream, window_tokens, num_windows, seed)
        if len(stream.document_starts) < 2:
            raise InputError(
                f"the {stream.name} is one document, which nothing could be packed with; give "
                "several files, or leave out data.documents"
            )
        self._borders = np.append(stream.document_starts, len(stream))

    def __len__(self) -> int:
        return len(self._cut)

    def build_batch(self, indices: NDArray[np.int64]) -> dict[str, Tensor]:
        """Cut the windows of ``indices`` [n]: ``{name: [n, T] int64}``.

        ``position_ids`` counts each document from 0; ``shift_labels`` has -100 at its last byte.
        """
        starts, window = self._cut.draw_starts(indices), self._cut.window_tokens
        texts = self._cut.stream.read_windows(starts, window)  # [n, T]
        rows = np.full((3, len(indices), window), IGNORED_LABEL, np.int64)
        for row, start in enumerate(starts.tolist()):
            self._fill(rows[:, row], texts[row], start)
        ids, labels, positions = map(torch.from_numpy, rows)
        return {"input_ids": ids, "shift_labels": labels, "position_ids": positions}

    def _fill(self, row: NDArray[np.int64], text: NDArray[np.uint8], start: int) -> None:
        """Write ids, labels and positions [3, T] of the window whose bytes begin at ``start``."""
        ids, labels, positions = row
        column, byte, window = 0, start, len(ids)
        document = int(np.searchsorted(self._borders, start, side="right"))
        while column < window:
            stop = int(self._borders[document])
            taken = min(window - column - 1, stop - byte)  # behind BOS
            told = text[byte - start : min(byte + taken + 1, stop) - start]
            ids[column] = BOS_ID
            ids[column + 1 : column + 1 + taken] = told[:taken]
            labels[column : column + len(told)] = told
            positions[column : column + 1 + taken] = np.arange(1 + taken)
            column, byte, document = column + 1 + taken, stop, document + 1


class ConsecutiveWindows(IndexedDataset):
    """Cut consecutive windows of T + 1 tokens, each overlapping the last by one token.

    Every token but BOS is predicted once; a rest of fewer than T predictions is dropped.

    Source: paper, validation of the byte-level WikiText-2 recipe.

    Args:
        stream: the split to walk from its start.
        window_tokens: T.
        num_windows: at most this many windows; ``None``: all. ``len()`` says how many there are.

    Raises:
        InputError: the stream is shorter than one window, or a number is out of range.
    """

    def __init__(
        self, stream: ByteStream, window_tokens: int, num_windows: int | None = None
    ) -> None:
        _check_sizes(window_tokens, 1 if num_windows is None else num_windows)
        self.stream = stream
        self.window_tokens = window_tokens
        whole = (stream.num_tokens - 1) // window_tokens
        if whole < 1:
            raise _explain_too_short(stream, window_tokens)
        self._num_windows = whole if num_windows is None else min(whole, num_windows)

    def __len__(self) -> int:
        return self._num_windows

    def build_batch(self, indices: NDArray[np.int64]) -> dict[str, Tensor]:
        """Cut the windows of ``indices`` [n]: ``{name: [n, T] int64}``."""
        starts = indices * self.window_tokens
        return _split_labels(self.stream.read_token_windows(starts, self.window_tokens + 1))


def _split_labels(tokens: NDArray[np.int64]) -> dict[str, Tensor]:
    rows = torch.from_numpy(tokens)  # [n, T + 1]
    return {
        "input_ids": rows[:, :-1].contiguous(),  # [n, T]
        "shift_labels": rows[:, 1:].contiguous(),  # [n, T]
    }


def _check_sizes(window_tokens: int, num_windows: int) -> None:
    if window_tokens < 1:
        raise InputError(f"window_tokens is {window_tokens}; a window has at least 1 token.")
    if num_windows < 1:
        raise InputError(f"num_windows is {num_windows}; ask for at least 1 window.")


def _explain_too_short(stream: ByteStream, window_tokens: int) -> InputError:
    return InputError(
        f"the {stream.name} has {len(stream):,} bytes, too few for one window of {window_tokens:,} "
        "tokens; give more text or a smaller window."
    )
