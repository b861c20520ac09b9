"""Chained recall: a key's value is a key in turn, and what that one is bound to is asked for."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from unimatrix.tasks.draws import (
    draw_columns,
    draw_distinct,
    draw_power_law_gaps,
    reduce_words,
    shuffle,
)
from unimatrix.tasks.seeded import SeededTask, label_positions, require_room


@dataclass(frozen=True)
class ChainedRecall(SeededTask):
    """Make ``a b`` and ``b v`` for each of P chains, then ask each a once; predict its v.

    The 2 P pairs stand in random order; a, b and v are distinct ids of three ranges. Key a_i is
    asked at position 4 P + 2 g_i, with gaps g as in ``MultiQueryRecall``; v is its label. Filler is
    uniform over the vocabulary.

    Raises:
        InputError: a number is out of range, or the questions do not fit into ``window_tokens``.
    """

    window_tokens: int
    """T, input tokens in an example, at least 6 P."""
    num_pairs: int
    """P, chains in an example, 1..2047."""

    FIRST_IDS: ClassVar[range] = range(1, 2048)
    MIDDLE_IDS: ClassVar[range] = range(2048, 4096)
    VALUE_IDS: ClassVar[range] = range(4096, 8192)
    vocab_size: ClassVar[int] = 8192

    def __post_init__(self) -> None:
        shortest = 6 * self.num_pairs
        require_room(
            self.num_pairs, len(self.FIRST_IDS), self.window_tokens, shortest, what="chains"
        )

    def build_batch(self, seed: int, indices: NDArray[np.int64]) -> dict[str, Tensor]:
        """Build chosen examples; see ``SeededTask.build_batch``."""
        num_pairs = self.num_pairs
        end = 4 * num_pairs
        num_gaps = (self.window_tokens - end) // 2
        sizes = [num_pairs, num_pairs, num_pairs, 2 * num_pairs, num_gaps, self.window_tokens]
        first_words, middle_words, value_words, order_words, gap_words, filler_words = draw_columns(
            seed, indices, sizes
        )
        first = self.FIRST_IDS.start + draw_distinct(first_words, len(self.FIRST_IDS))  # [n, P]
        middle = self.MIDDLE_IDS.start + draw_distinct(middle_words, len(self.MIDDLE_IDS))
        values = self.VALUE_IDS.start + draw_distinct(value_words, len(self.VALUE_IDS))
        order = shuffle(order_words)  # [n, 2 P]
        keys = np.take_along_axis(np.concatenate([first, middle], axis=1), order, axis=1)
        bound = np.take_along_axis(np.concatenate([middle, values], axis=1), order, axis=1)

        input_ids = reduce_words(filler_words, self.vocab_size)  # [n, T]
        input_ids[:, 0:end:2] = keys
        input_ids[:, 1:end:2] = bound
        places = end + 2 * draw_power_law_gaps(gap_words, num_pairs)  # [n, P]
        np.put_along_axis(input_ids, places, first, axis=1)
        return label_positions(input_ids, places, values)
