"""Needles in a haystack: sentences that bind a key to a value, asked for after a long text.

Source: RULER ``data/synthetic/niah.py``; the wording, words and filler are our own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from unimatrix.errors import InputError, require_choice
from unimatrix.tasks.ruler.example import NUM_DEPTHS, Draws, LongExample, LongTask, choose_depths
from unimatrix.tasks.ruler.words import (
    LONGEST_KEY,
    NUM_DIGITS,
    UUID_CHARACTERS,
    draw_key,
    draw_number,
    draw_uuid,
)

HAYSTACKS = ("noise", "essay", "needles")
NOISE = (
    b"The river runs down to the sea. The wind moves the leaves. The lamp stands by the door. "
    b"We walk on. Home is not far.\n"
)
"""The filler of the haystack ``noise``, over and over."""
_DRAW_KEY = {"words": draw_key, "code": draw_uuid}
_DRAW_VALUE = {"number": draw_number, "code": draw_uuid}
_LONGEST = {"words": LONGEST_KEY, "number": NUM_DIGITS, "code": UUID_CHARACTERS}
_INTRO = "Some secret {kind}s are hidden in the text below. Keep them in mind for a question.\n"
_NEEDLE = "One of the secret {kind}s of {key} is: {value}."
_QUESTION = (
    "\nQuestion: Which secret {kind}{s} of {keys} does the text above tell?\n"
    "Answer: The secret {kind}{s} of {keys} told by the text {are}"
)
# How far a needle may move back to stand on a line of its own.
_MOST_BACK_BYTES = 200


@dataclass(frozen=True, kw_only=True, eq=False)
class NeedleSearch(LongTask):
    """Hide needles in a text of exact length and ask for the values of some keys.

    Args:
        haystack: ``noise`` (the same sentences over and over), ``essay`` (a window of ``text``,
            which is repeated if it is short) or ``needles`` (other needles alone).
        text: [bytes] uint8 of an essay; read, never written.
        keys: needles with a key of their own; the first ``queries`` of them are asked for.
        values: values of each key.
        queries: keys asked for.
        key_kind: ``words`` or ``code`` (a UUID).
        value_kind: ``number`` (7 digits) or ``code`` (a UUID, 36 characters).
    """

    haystack: str
    text: NDArray[np.uint8] | None = field(default=None, repr=False)
    keys: int = 1
    values: int = 1
    queries: int = 1
    key_kind: str = "words"
    value_kind: str = "number"

    max_new_bytes: ClassVar[int] = 512  # RULER: 128 tokens.

    def __post_init__(self) -> None:
        require_choice("there is no haystack", self.haystack, HAYSTACKS)
        if self.haystack == "essay" and (self.text is None or not len(self.text)):
            raise InputError("the haystack essay needs a text of at least one byte; give text")
        # Every example must fit, so the longest keys and values are measured.
        key, value = "x" * _LONGEST[self.key_kind], "x" * _LONGEST[self.value_kind]
        frame = self._frame([key] * self.queries)
        needles = [self._write(key, value)] * (self.keys * self.values)
        self.require_room(self.max_new_bytes + sum(map(len, (*frame, *needles))) + NUM_DEPTHS)

    def build(self, seed: int, index: int) -> LongExample:
        """Build one example; see ``LongTask.build``."""
        draws = Draws(seed, index)
        bindings = self._draw_bindings(draws)
        queried = list(bindings)[: self.queries]
        references = [value.encode() for key in queried for value in bindings[key]]
        intro, question = self._frame(queried)
        needles = [self._write(key, value) for key, values in bindings.items() for value in values]
        depths = choose_depths(draws, index, len(needles))
        room = self.total_bytes - self.max_new_bytes - len(intro) - len(question)
        room -= sum(map(len, needles))
        taken = {*bindings, *(value for values in bindings.values() for value in values)}
        hay = self._draw_hay(draws, room, taken)
        prompt = intro + scatter(hay, depths, needles) + question
        return self.finish(prompt, references, [depth / (NUM_DEPTHS - 1) for depth in depths])

    def _draw_bindings(self, draws: Draws) -> dict[str, list[str]]:
        """Draw distinct keys and, over all of them, distinct values."""
        keys: dict[str, None] = {}
        while len(keys) < self.keys:
            keys[_DRAW_KEY[self.key_kind](draws)] = None
        values: dict[str, None] = {}
        while len(values) < self.keys * self.values:
            values[_DRAW_VALUE[self.value_kind](draws)] = None
        drawn = list(values)
        return {key: drawn[i * self.values : (i + 1) * self.values] for i, key in enumerate(keys)}

    def _draw_hay(self, draws: Draws, room: int, taken: set[str]) -> bytes:
        """Return a haystack of ``room`` bytes that holds no key and no value of ``taken``."""
        if self.haystack == "noise":
            return repeat_noise(room)
        if self.haystack == "needles":
            return self._draw_distractors(draws, room, taken)
        assert self.text is not None
        num_bytes = len(self.text)
        start = draws.below(num_bytes - room + 1 if room <= num_bytes else num_bytes)
        return self.text[(start + np.arange(room)) % num_bytes].tobytes()

    def _draw_distractors(self, draws: Draws, room: int, taken: set[str]) -> bytes:
        """Return other needles, the first cut at its start so that they fill the room."""
        lines: list[bytes] = []
        while room > 0:
            key, value = _DRAW_KEY[self.key_kind](draws), _DRAW_VALUE[self.value_kind](draws)
            if key in taken or value in taken:
                continue
            line = self._write(key, value)
            lines.append(line[-room:])
            room -= len(line)
        return b"".join(lines[::-1])

    def _write(self, key: str, value: str) -> bytes:
        """Return a needle as a line of its own."""
        sentence = _NEEDLE.format(kind=self.value_kind, key=key, value=value)
        return f"{sentence}\n".encode()

    def _frame(self, keys: Sequence[str]) -> tuple[bytes, bytes]:
        """Return what stands before the haystack and after it."""
        several = self.values * len(keys) > 1
        question = _QUESTION.format(
            kind=self.value_kind,
            s="s" if several else "",
            are="are" if several else "is",
            keys=keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])} and {keys[-1]}",
        )
        return _INTRO.format(kind=self.value_kind).encode(), question.encode()


def repeat_noise(num_bytes: int) -> bytes:
    """Return ``num_bytes`` bytes of the filler."""
    return (NOISE * (num_bytes // len(NOISE) + 1))[:num_bytes]


def scatter(hay: bytes, depths: Sequence[int], needles: Sequence[bytes]) -> bytes:
    """Insert needles into a text at depths of 0..39; those of one place keep their order.

    A needle stands at the start of the line at its depth, or else of the word, at most 200 bytes
    back.
    """
    places = [_find_place(hay, depth) for depth in depths]
    parts, last = [], 0
    for number in sorted(range(len(needles)), key=lambda number: places[number]):
        parts += [hay[last : places[number]], needles[number]]
        last = places[number]
    return b"".join([*parts, hay[last:]])


def _find_place(hay: bytes, depth: int) -> int:
    exact = round(depth * len(hay) / (NUM_DEPTHS - 1))
    first = max(0, exact - _MOST_BACK_BYTES)
    line = hay.rfind(b"\n", first, exact) + 1
    if line or first == 0:
        return line
    return hay.rfind(b" ", first, exact) + 1 or exact
