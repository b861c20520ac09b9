"""Recall by the nearest key: the question has one letter of the key wrong."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from unimatrix.tasks.draws import draw_columns, reduce_words
from unimatrix.tasks.seeded import SeededTask, require_room, split_answer
from unimatrix.tokenization import VOCAB_SIZE

_WORD_LETTERS = 4  # of a key and of a value
_KEY_DISTANCE = 3
_PAIR_BYTES = 2 * _WORD_LETTERS + 2  # key=value;
_QUESTION_BYTES = 2 * _WORD_LETTERS + 2  # ?key=value
_NUM_LETTERS = 26
_FIRST_LETTER = ord("a")


@dataclass(frozen=True)
class NoisyKeys(SeededTask):
    """Make bytes ``key=value;`` P times, filler, ``?key=`` with one wrong letter; predict value.

    Keys and values are 4 random lower-case letters; two keys differ in at least 3 places, so the
    key asked for, 1 place away, is nearer than any other. Any of the P is asked for, and the wrong
    letter may stand in any place. Filler is random lower-case letters. An example is a document of
    T bytes that ends with the value: the input is BOS and the first T - 1 of them, so it ends with
    three bytes of the value, and the labels are the 4 bytes of the value on the last 4 positions.

    Raises:
        InputError: ``num_pairs`` leaves 1..32, or the pairs do not fit into ``window_tokens``.
    """

    num_pairs: int = 16
    """P, 1..32."""
    window_tokens: int = 512
    """T, input tokens in an example, BOS, question and three bytes of the value included."""

    MAX_PAIRS: ClassVar[int] = 32
    vocab_size: ClassVar[int] = VOCAB_SIZE

    def __post_init__(self) -> None:
        shortest = self.num_pairs * _PAIR_BYTES + _QUESTION_BYTES
        require_room(self.num_pairs, self.MAX_PAIRS, self.window_tokens, shortest)

    def build_batch(self, seed: int, indices: NDArray[np.int64]) -> dict[str, Tensor]:
        """Build chosen examples; see ``SeededTask.build_batch``."""
        num_rows, num_pairs = len(indices), self.num_pairs
        # At most 28 % of candidates are too near one that was taken; too few would be left only if
        # three in four were.
        num_candidates = 4 * num_pairs + 8
        word_sizes = [_WORD_LETTERS * num_candidates, _WORD_LETTERS * num_pairs]
        key_words, value_words, query_words, place_words, shift_words, filler_words = draw_columns(
            seed, indices, [*word_sizes, 1, 1, 1, self.window_tokens]
        )
        candidates = reduce_words(key_words, _NUM_LETTERS)
        keys = _pick_distant(candidates.reshape(num_rows, -1, _WORD_LETTERS), num_pairs)
        values = reduce_words(value_words, _NUM_LETTERS).reshape(num_rows, -1, _WORD_LETTERS)

        rows = np.arange(num_rows)
        queried = reduce_words(query_words, num_pairs)[:, 0]
        question = keys[rows, queried]  # [n, 4]
        place = reduce_words(place_words, _WORD_LETTERS)[:, 0]
        question[rows, place] += 1 + reduce_words(shift_words, _NUM_LETTERS - 1)[:, 0]
        question %= _NUM_LETTERS

        pairs = np.empty((num_rows, num_pairs, _PAIR_BYTES), np.int64)
        pairs[:, :, :4] = _FIRST_LETTER + keys
        pairs[:, :, 4] = ord("=")
        pairs[:, :, 5:9] = _FIRST_LETTER + values
        pairs[:, :, 9] = ord(";")
        documents = _FIRST_LETTER + reduce_words(filler_words, _NUM_LETTERS)  # [n, T]
        documents[:, : num_pairs * _PAIR_BYTES] = pairs.reshape(num_rows, -1)
        documents[:, -10] = ord("?")
        documents[:, -9:-5] = _FIRST_LETTER + question
        documents[:, -5] = ord("=")
        documents[:, -4:] = _FIRST_LETTER + values[rows, queried]
        return split_answer(documents.astype(np.uint8), _WORD_LETTERS)


def _pick_distant(candidates: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Return the first ``count`` words [n, count, 4] of candidates [n, c, 4] far from each other.

    A candidate is taken if it differs from all taken before it in at least 3 places.
    """
    num_rows, num_candidates, _ = candidates.shape
    distances = (candidates[:, :, None] != candidates[:, None]).sum(-1)  # [n, c, c]
    near = distances < _KEY_DISTANCE
    taken = np.zeros((num_rows, num_candidates), bool)
    for place in range(num_candidates):
        taken[:, place] = ~(near[:, place, :place] & taken[:, :place]).any(1)
    assert (taken.sum(1) >= count).all()
    chosen = np.argsort(~taken, axis=1, kind="stable")[:, :count]
    return np.take_along_axis(candidates, chosen[:, :, None], axis=1)
