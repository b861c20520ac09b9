"""Multi-query associative recall: every binding first, then every key asked for once."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from unimatrix.errors import InputError
from unimatrix.tasks.draws import draw_columns, draw_distinct, draw_power_law_gaps, reduce_words
from unimatrix.tasks.seeded import SeededTask, label_positions, require_room


@dataclass(frozen=True)
class MultiQueryRecall(SeededTask):
    """Make ``k1 v1 ... kP vP``, then ask each key once among filler; predict its value.

    Keys are distinct, values are distinct. Key i is asked at position E + 2 g_i, where E is the end
    of the bindings and the gaps g follow a power law (``draw_power_law_gaps``). Its value is the
    label of that position and does not stand after it; every other position is filler.

    With ``num_rebound`` R, R of the keys, in random order, are bound again to new values right
    after the P pairs: ``k v`` R times, T = ``window_tokens`` + 2 R. The last value is the answer.

    Source: zoology ``data/multiquery_ar.py``; ``random_filler`` is its ``random_non_queries``.

    Raises:
        InputError: a number is out of range, or the questions do not fit into ``window_tokens``.
    """

    window_tokens: int
    """Input tokens without the rebound pairs, at least 4 P; an odd one ends with filler."""
    num_pairs: int
    """P, keys in an example."""
    random_filler: bool = True
    """True: filler is uniform over the vocabulary (grid B). False: it is id 0 (grid A)."""
    num_rebound: int = 0
    """R, keys bound twice, 0..P."""

    KEY_IDS: ClassVar[range] = range(1, 4096)
    VALUE_IDS: ClassVar[range] = range(4096, 8192)
    vocab_size: ClassVar[int] = 8192

    def __post_init__(self) -> None:
        most = min(self.num_pairs, len(self.VALUE_IDS) - self.num_pairs)
        if not 0 <= self.num_rebound <= most:
            raise InputError(f"num_rebound is {self.num_rebound}; choose 0 to {most}.")
        shortest = 4 * self.num_pairs
        require_room(self.num_pairs, len(self.KEY_IDS), self.window_tokens, shortest)

    @property
    def num_tokens(self) -> int:
        """T, input tokens in an example, the rebound pairs included."""
        return self.window_tokens + 2 * self.num_rebound

    def build_batch(self, seed: int, indices: NDArray[np.int64]) -> dict[str, Tensor]:
        """Build chosen examples; see ``SeededTask.build_batch``."""
        num_pairs, num_bindings = self.num_pairs, self.num_pairs + self.num_rebound
        num_gaps = (self.window_tokens - 2 * num_pairs) // 2
        sizes = [num_pairs, num_bindings, self.num_rebound, num_gaps, self.num_tokens]
        key_words, value_words, rebound_words, gap_words, filler_words = draw_columns(
            seed, indices, sizes
        )
        keys = self.KEY_IDS.start + draw_distinct(key_words, len(self.KEY_IDS))  # [n, P]
        values = self.VALUE_IDS.start + draw_distinct(value_words, len(self.VALUE_IDS))
        rebound = draw_distinct(rebound_words, num_pairs)  # [n, R]
        answers = values[:, :num_pairs].copy()
        np.put_along_axis(answers, rebound, values[:, num_pairs:], axis=1)

        # Grid A draws the words too, so that the grids of a seed differ in filler alone.
        input_ids = reduce_words(filler_words, self.vocab_size if self.random_filler else 1)
        end = 2 * num_bindings
        again = np.take_along_axis(keys, rebound, axis=1)
        input_ids[:, 0:end:2] = np.concatenate([keys, again], axis=1)
        input_ids[:, 1:end:2] = values
        places = end + 2 * draw_power_law_gaps(gap_words, num_pairs)  # [n, P]
        np.put_along_axis(input_ids, places, keys, axis=1)
        return label_positions(input_ids, places, answers)
