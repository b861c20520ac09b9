"""The paper's associative recall: a few bindings, filler, one question, one answer."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unimatrix.data.counter_random import draw_words
from unimatrix.data.indexed import IndexedDataset
from unimatrix.errors import InputError

IGNORED_LABEL = -100
_QUESTION_TOKENS = 3  # QUERY, key, ANSWER


@dataclass(frozen=True)
class AssociativeRecall:
    """Make sequences ``BOS (key value SEP) * pairs filler QUERY key ANSWER``; predict the value.

    Keys are distinct, values are distinct, any of the keys is asked for, and filler is uniform. The
    only label is the value, on the last position.

    Source: paper, associative recall; 4 pairs in training, 4, 6 and 8 in tests.

    Raises:
        InputError: ``num_pairs`` leaves 1..8, or the pairs do not fit into ``window_tokens``.
    """

    num_pairs: int = 4
    """Bindings in a sequence, 1..8."""
    window_tokens: int = 128
    """T, input tokens in a sequence, the question included."""

    PAD_ID: ClassVar[int] = 0
    BOS_ID: ClassVar[int] = 1
    SEP_ID: ClassVar[int] = 2
    QUERY_ID: ClassVar[int] = 3
    ANSWER_ID: ClassVar[int] = 4
    KEY_IDS: ClassVar[range] = range(5, 13)
    VALUE_IDS: ClassVar[range] = range(13, 21)
    FILLER_IDS: ClassVar[range] = range(21, 31)
    vocab_size: ClassVar[int] = 64
    """V; ids 31..63 never occur."""

    def __post_init__(self) -> None:
        if not 1 <= self.num_pairs <= len(self.KEY_IDS):
            raise InputError(f"num_pairs is {self.num_pairs}; choose 1 to {len(self.KEY_IDS)}.")
        shortest = 1 + 3 * self.num_pairs + _QUESTION_TOKENS
        if self.window_tokens < shortest:
            raise InputError(
                f"window_tokens is {self.window_tokens}, too short for {self.num_pairs} pairs; "
                f"choose at least {shortest}."
            )

    @property
    def chance_fraction(self) -> float:
        """Accuracy of a guess among the values."""
        return 1 / len(self.VALUE_IDS)

    def build(self, seed: int, num_examples: int) -> dict[str, Tensor]:
        """Build examples 0..n-1 of a seed: ``{"input_ids", "shift_labels"}``, each [n, T] int64."""
        if num_examples < 1:
            raise InputError(f"num_examples is {num_examples}; ask for at least 1.")
        return self.build_batch(seed, np.arange(num_examples, dtype=np.int64))

    def build_batch(self, seed: int, indices: NDArray[np.int64]) -> dict[str, Tensor]:
        """Build chosen examples; each is a pure function of (task, seed, index).

        Args:
            seed: >= 0; two seeds share no examples but by chance.
            indices: [n] int64, >= 0.

        Returns:
            ``input_ids`` [n, T] int64 and ``shift_labels`` [n, T] int64, -100 but for the last.

        Raises:
            InputError: ``seed`` is negative.
        """
        num_keys, num_values = len(self.KEY_IDS), len(self.VALUE_IDS)
        words = draw_words(seed, indices, num_keys + num_values + 1 + self.window_tokens)
        key_words, value_words, question_words, filler_words = np.split(
            words, [num_keys, num_keys + num_values, num_keys + num_values + 1], axis=1
        )
        keys = self.KEY_IDS.start + _shuffle(key_words)[:, : self.num_pairs]
        values = self.VALUE_IDS.start + _shuffle(value_words)[:, : self.num_pairs]
        asked = _reduce(question_words, self.num_pairs)  # [n, 1]

        input_ids = self.FILLER_IDS.start + _reduce(filler_words, len(self.FILLER_IDS))  # [n, T]
        end_of_pairs = 1 + 3 * self.num_pairs
        input_ids[:, 0] = self.BOS_ID
        input_ids[:, 1:end_of_pairs:3] = keys
        input_ids[:, 2:end_of_pairs:3] = values
        input_ids[:, 3:end_of_pairs:3] = self.SEP_ID
        input_ids[:, -3] = self.QUERY_ID
        input_ids[:, -2:-1] = np.take_along_axis(keys, asked, axis=1)
        input_ids[:, -1] = self.ANSWER_ID
        labels = np.full_like(input_ids, IGNORED_LABEL)
        labels[:, -1:] = np.take_along_axis(values, asked, axis=1)
        return {"input_ids": torch.from_numpy(input_ids), "shift_labels": torch.from_numpy(labels)}

    def dataset(self, seed: int, num_examples: int) -> "RecallDataset":
        """Return examples 0..n-1 of a seed as a map-style dataset, built when asked for."""
        return RecallDataset(self, seed, num_examples)


class RecallDataset(IndexedDataset):
    """The examples of one seed by index; see ``AssociativeRecall.dataset``."""

    def __init__(self, task: AssociativeRecall, seed: int, num_examples: int) -> None:
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


def _shuffle(words: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return a random permutation of 0..m-1 for each row of words [n, m]."""
    return np.argsort(words, axis=1, kind="stable").astype(np.int64)


def _reduce(words: NDArray[np.uint64], size: int) -> NDArray[np.int64]:
    """Map words to 0..size-1, uniform to size / 2**64."""
    return (words % np.uint64(size)).astype(np.int64)
