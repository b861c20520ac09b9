"""Compositional recall: a key is two ids, and neither of them alone tells the value."""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from unimatrix.errors import InputError
from unimatrix.tasks.draws import (
    draw_columns,
    draw_distinct,
    draw_power_law_gaps,
    reduce_words,
    shuffle,
)
from unimatrix.tasks.seeded import SeededTask, label_positions, require_room


@dataclass(frozen=True)
class CompositionalRecall(SeededTask):
    """Make ``a b v`` for each of P pairs, then ask each ``a b`` once; predict v.

    The keys of an example are P cells of a grid of s ids ``a`` and s ids ``b``, s = ceil(sqrt(P)),
    so that every ``a`` stands with floor(P / s) or one more of the ``b``, and every ``b`` with as
    many of the ``a``: at least 2. The ids, the cells and the order of the pairs are random; values
    are distinct.

    Key i is asked at positions 3 P + 2 g_i and the next, with gaps g as in ``MultiQueryRecall``;
    the value is the label of ``b``. Filler is uniform over the vocabulary.

    Raises:
        InputError: no grid holds ``num_pairs`` such cells, or they do not fit ``window_tokens``.
    """

    window_tokens: int
    """T, input tokens in an example, at least 5 P; what two-token questions leave is filler."""
    num_pairs: int
    """P, 4..4096 but not 5, for which every grid leaves an id with one partner."""

    FIRST_IDS: ClassVar[range] = range(1, 2048)
    SECOND_IDS: ClassVar[range] = range(2048, 4096)
    VALUE_IDS: ClassVar[range] = range(4096, 8192)
    vocab_size: ClassVar[int] = 8192

    def __post_init__(self) -> None:
        if not 4 <= self.num_pairs <= len(self.VALUE_IDS) or self.num_pairs == 5:
            raise InputError(
                f"num_pairs is {self.num_pairs}; choose 4, or 6 to {len(self.VALUE_IDS)}."
            )
        shortest = 5 * self.num_pairs
        require_room(self.num_pairs, len(self.VALUE_IDS), self.window_tokens, shortest)

    def build_batch(self, seed: int, indices: NDArray[np.int64]) -> dict[str, Tensor]:
        """Build chosen examples; see ``SeededTask.build_batch``."""
        num_pairs = self.num_pairs
        side = math.isqrt(num_pairs - 1) + 1
        end = 3 * num_pairs
        num_gaps = (self.window_tokens - end) // 2
        sizes = [side, side, num_pairs, num_pairs, num_gaps, self.window_tokens]
        first_words, second_words, order_words, value_words, gap_words, filler_words = draw_columns(
            seed, indices, sizes
        )
        row_ids = self.FIRST_IDS.start + draw_distinct(first_words, len(self.FIRST_IDS))  # [n, s]
        column_ids = self.SECOND_IDS.start + draw_distinct(second_words, len(self.SECOND_IDS))
        # Diagonal after diagonal: each adds one cell to every row and every column.
        cells = shuffle(order_words)  # [n, P]
        rows, columns = cells % side, (cells + cells // side) % side
        first = np.take_along_axis(row_ids, rows, axis=1)  # [n, P]
        second = np.take_along_axis(column_ids, columns, axis=1)  # [n, P]
        values = self.VALUE_IDS.start + draw_distinct(value_words, len(self.VALUE_IDS))

        input_ids = reduce_words(filler_words, self.vocab_size)  # [n, T]
        input_ids[:, 0:end:3] = first
        input_ids[:, 1:end:3] = second
        input_ids[:, 2:end:3] = values
        places = end + 2 * draw_power_law_gaps(gap_words, num_pairs)  # [n, P]
        np.put_along_axis(input_ids, places, first, axis=1)
        np.put_along_axis(input_ids, places + 1, second, axis=1)
        return label_positions(input_ids, places + 1, values)
