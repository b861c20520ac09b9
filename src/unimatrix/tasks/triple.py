"""Triple interactions: recall the three values of a tag and combine them by one of four rules."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from unimatrix.data.counter_random import draw_words
from unimatrix.errors import InputError, suggest
from unimatrix.tasks.draws import draw_columns, reduce_words, shuffle
from unimatrix.tasks.seeded import SeededTask, label_positions

_NUM_TAGS = 3
_NUM_ROLES = 3
_NUM_LEVELS = 8  # of a value
_NUM_CLASSES = 16
_BODY_TOKENS = 45  # between the task token and QUERY
_NUM_ITEMS = 27  # of a body: 3 records of 7 tokens and 24 filler, or 9 chunks of 3 and 18 filler
_TABLE_SEED = 16


@dataclass(frozen=True)
class TripleInteraction(SeededTask):
    """Make ``BOS task records filler QUERY tag``; predict the class that the rule gives the tag.

    Each of 3 tags has values a, b, c, uniform in 0..7. A record is ``tag A a B b C c``; under
    ``lookup`` each is cut into three chunks ``tag role value``. Records or chunks stand in random
    order, filler in random gaps between them, 49 tokens in all. Any tag is asked for. The only
    label is the class, on the last position; classes never occur in the input:

        copy    a
        affine  (a + 2 b + 3 c) mod 16
        gate    (a (b + 1) + c ((a xor b) + 1)) mod 16
        lookup  table[a, b, c], the same for every seed; see ``lookup_table``

    Source: paper, corrected triple-interaction benchmark; ids of classes are this project's.

    Raises:
        InputError: ``rule`` is not one of the four.
    """

    rule: str | None = None
    """copy, affine, gate or lookup; ``None``: one of them at random in every example."""

    BOS_ID: ClassVar[int] = 1
    QUERY_ID: ClassVar[int] = 2
    ROLE_IDS: ClassVar[range] = range(3, 6)
    FILLER_IDS: ClassVar[range] = range(6, 22)
    VALUE_IDS: ClassVar[range] = range(22, 46)
    """Eight ids for the values of role A, then eight for B, then eight for C."""
    TAG_IDS: ClassVar[range] = range(46, 49)
    TASK_IDS: ClassVar[range] = range(49, 53)
    CLASS_IDS: ClassVar[range] = range(53, 69)
    RULES: ClassVar[tuple[str, ...]] = ("copy", "affine", "gate", "lookup")
    window_tokens: ClassVar[int] = 49
    """T, input tokens in an example."""
    vocab_size: ClassVar[int] = 69
    """V; PAD 0 never occurs."""

    def __post_init__(self) -> None:
        if self.rule is not None and self.rule not in self.RULES:
            raise InputError(
                f"rule is {self.rule!r}; choose {', '.join(self.RULES)} or None."
                f"{suggest(self.rule, self.RULES)}"
            )

    @staticmethod
    def lookup_table() -> NDArray[np.int64]:
        """Return the table of the lookup rule, [8, 8, 8] int64 in 0..15.

        Entry i of the flat table is the first word of item i under seed 16, modulo 16.
        """
        words = draw_words(_TABLE_SEED, np.arange(_NUM_LEVELS**3, dtype=np.int64), 1)
        return reduce_words(words, _NUM_CLASSES).reshape(_NUM_LEVELS, _NUM_LEVELS, _NUM_LEVELS)

    def build_batch(self, seed: int, indices: NDArray[np.int64]) -> dict[str, Tensor]:
        """Build chosen examples; see ``SeededTask.build_batch``."""
        num_rows = len(indices)
        value_words, rule_words, query_words, order_words, filler_words = draw_columns(
            seed, indices, [_NUM_TAGS * _NUM_ROLES, 1, 1, _NUM_ITEMS, _BODY_TOKENS]
        )
        values = reduce_words(value_words, _NUM_LEVELS).reshape(num_rows, _NUM_TAGS, _NUM_ROLES)
        queried = reduce_words(query_words, _NUM_TAGS)[:, 0]
        if self.rule is None:
            rules = reduce_words(rule_words, len(self.RULES))[:, 0]
        else:
            rules = np.full(num_rows, self.RULES.index(self.rule))
        filler = self.FILLER_IDS.start + reduce_words(filler_words, len(self.FILLER_IDS))
        records, chunks = self._write_records(values)
        order = shuffle(order_words)
        in_chunks = (rules == self.RULES.index("lookup"))[:, None]

        input_ids = np.empty((num_rows, self.window_tokens), np.int64)
        input_ids[:, 0] = self.BOS_ID
        input_ids[:, 1] = self.TASK_IDS.start + rules
        input_ids[:, 2:-2] = np.where(
            in_chunks, _scatter(chunks, filler, order), _scatter(records, filler, order)
        )
        input_ids[:, -2] = self.QUERY_ID
        input_ids[:, -1] = self.TAG_IDS.start + queried
        classes = self.CLASS_IDS.start + self._classify(values[np.arange(num_rows), queried], rules)
        return label_positions(input_ids, np.array([[-1]]), classes[:, None])

    def _write_records(
        self, values: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Write values [n, 3, 3] as records [n, 3, 7] and as chunks [n, 9, 3]."""
        num_rows = len(values)
        triples = np.empty((num_rows, _NUM_TAGS, _NUM_ROLES, 3), np.int64)  # tag role value
        triples[..., 0] = np.array(self.TAG_IDS)[:, None]
        triples[..., 1] = np.array(self.ROLE_IDS)
        triples[..., 2] = np.array(self.VALUE_IDS[::_NUM_LEVELS]) + values
        records = np.empty((num_rows, _NUM_TAGS, 1 + 2 * _NUM_ROLES), np.int64)
        records[..., 0] = triples[..., 0, 0]
        records[..., 1:] = triples[..., 1:].reshape(num_rows, _NUM_TAGS, -1)
        return records, triples.reshape(num_rows, -1, 3)

    def _classify(self, values: NDArray[np.int64], rules: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the class [n] in 0..15 that each row's rule gives its values [n, 3]."""
        a, b, c = values.T
        by_rule = np.stack(
            [
                a,
                (a + 2 * b + 3 * c) % _NUM_CLASSES,
                (a * (b + 1) + c * ((a ^ b) + 1)) % _NUM_CLASSES,
                self.lookup_table()[a, b, c],
            ]
        )  # [4, n]
        return by_rule[rules, np.arange(len(rules))]


def _scatter(
    pieces: NDArray[np.int64], filler: NDArray[np.int64], order: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Write pieces [n, c, w] over filler [n, 45]; j < c in ``order`` [n, 27] stands for piece j."""
    num_rows, num_pieces, width = pieces.shape
    lengths = np.where(order < num_pieces, width, 1)
    starts = np.cumsum(lengths, axis=1) - lengths  # [n, 27]
    places = np.argsort(order, axis=1)[:, :num_pieces]  # [n, c], where each piece is
    positions = np.take_along_axis(starts, places, axis=1)[:, :, None] + np.arange(width)
    body = filler.copy()
    np.put_along_axis(body, positions.reshape(num_rows, -1), pieces.reshape(num_rows, -1), axis=1)
    return body
