"""The base of long-context tasks: a prompt of bytes, references, and room for the answer."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import numpy as np
from numpy.random import Philox

from unimatrix.data.counter_random import draw_words
from unimatrix.errors import InputError

T = TypeVar("T")

NUM_DEPTHS = 40
"""Needles stand at equal steps of depth, from the start of the haystack to its end."""
# Coprime to NUM_DEPTHS: 40 examples in a row have every depth once, and few are spread out.
_DEPTH_STRIDE = 17


@dataclass(frozen=True, slots=True)
class LongExample:
    """One example.

    Attributes:
        prompt: what the model reads.
        references: the parts of a right answer.
        max_new_bytes: room for the answer.
        depths: of the needles, 0..1 of the haystack; empty in a task without needles.
    """

    prompt: bytes
    references: tuple[bytes, ...]
    max_new_bytes: int
    depths: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LongTask(ABC):
    """A task of an exact length: prompt and answer together take ``total_bytes``.

    Raises:
        InputError: ``total_bytes`` is too short for the task; the message says how many it needs.
    """

    total_bytes: int
    """Bytes of the prompt and of the room for the answer."""

    max_new_bytes: ClassVar[int]

    @abstractmethod
    def build(self, seed: int, index: int) -> LongExample:
        """Build one example, a pure function of (task, seed, index)."""

    def require_room(self, needed_bytes: int) -> None:
        """Raise ``InputError`` unless the task fits ``total_bytes``."""
        if self.total_bytes < needed_bytes:
            raise InputError(
                f"{self.total_bytes:,} bytes are too few for the task, which needs {needed_bytes:,}"
            )

    def finish(
        self, prompt: bytes, references: Sequence[bytes], depths: Sequence[float] = ()
    ) -> LongExample:
        """Return the example, whose length is checked."""
        assert len(prompt) + self.max_new_bytes == self.total_bytes, (len(prompt), self)
        return LongExample(prompt, tuple(references), self.max_new_bytes, tuple(depths))


class Draws:
    """A sequence of random numbers for one example, the same on every machine."""

    def __init__(self, seed: int, index: int) -> None:
        key = draw_words(seed, np.array([index], np.int64), 2)[0]
        self._generator = Philox(key=key)

    def below(self, size: int) -> int:
        """Draw a number of 0..size-1, uniform to size / 2**64."""
        return int(self._generator.random_raw()) % size

    def distinct(self, size: int, count: int) -> list[int]:
        """Draw ``count`` distinct numbers of 0..size-1 in random order."""
        assert count <= size, (count, size)
        drawn: dict[int, None] = {}
        while len(drawn) < count:
            drawn[self.below(size)] = None
        return list(drawn)

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """Return the items in random order."""
        words = self._generator.random_raw(len(items))
        return [items[place] for place in np.argsort(words, kind="stable")]


def choose_depths(draws: Draws, index: int, count: int) -> list[int]:
    """Return distinct depths 0..39 of needles: the first by the example's index, others drawn."""
    first = index * _DEPTH_STRIDE % NUM_DEPTHS
    others = [depth for depth in range(NUM_DEPTHS) if depth != first]
    return [first, *(others[place] for place in draws.distinct(len(others), count - 1))]


def score_references(answer: bytes, references: Sequence[bytes]) -> float:
    """Return the share of references that the answer holds, whatever their case.

    Source: RULER ``eval/synthetic/constants.py``, ``string_match_all``.
    """
    lowered = answer.lower()
    return sum(reference.lower() in lowered for reference in references) / len(references)
