"""The paper's associative recall: a few bindings, filler, one question, one answer."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from unimatrix.tasks.draws import draw_columns, reduce_words, shuffle
from unimatrix.tasks.seeded import SeededTask, label_positions, require_room

_QUESTION_TOKENS = 3  # QUERY, key, ANSWER


@dataclass(frozen=True)
class AssociativeRecall(SeededTask):
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
        shortest = 1 + 3 * self.num_pairs + _QUESTION_TOKENS
        require_room(self.num_pairs, len(self.KEY_IDS), self.window_tokens, shortest)

    @property
    def chance_fraction(self) -> float:
        """Accuracy of a guess among the values."""
        return 1 / len(self.VALUE_IDS)

    def build_batch(self, seed: int, indices: NDArray[np.int64]) -> dict[str, Tensor]:
        """Build chosen examples; see ``SeededTask.build_batch``."""
        num_keys, num_values = len(self.KEY_IDS), len(self.VALUE_IDS)
        key_words, value_words, question_words, filler_words = draw_columns(
            seed, indices, [num_keys, num_values, 1, self.window_tokens]
        )
        keys = self.KEY_IDS.start + shuffle(key_words)[:, : self.num_pairs]
        values = self.VALUE_IDS.start + shuffle(value_words)[:, : self.num_pairs]
        queried = reduce_words(question_words, self.num_pairs)  # [n, 1]

        input_ids = self.FILLER_IDS.start + reduce_words(
            filler_words, len(self.FILLER_IDS)
        )  # [n, T]
        end_of_pairs = 1 + 3 * self.num_pairs
        input_ids[:, 0] = self.BOS_ID
        input_ids[:, 1:end_of_pairs:3] = keys
        input_ids[:, 2:end_of_pairs:3] = values
        input_ids[:, 3:end_of_pairs:3] = self.SEP_ID
        input_ids[:, -3] = self.QUERY_ID
        input_ids[:, -2:-1] = np.take_along_axis(keys, queried, axis=1)
        input_ids[:, -1] = self.ANSWER_ID
        answers = np.take_along_axis(values, queried, axis=1)
        return label_positions(input_ids, np.array([[-1]]), answers)
