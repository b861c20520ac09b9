"""Variable tracking: a chain of assignments scattered over a text; who holds the value?

Source: RULER ``data/synthetic/variable_tracking.py``; the wording and filler are our own.
"""

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from unimatrix.tasks.ruler.example import NUM_DEPTHS, Draws, LongExample, LongTask, choose_depths
from unimatrix.tasks.ruler.needles import NOISE, repeat_noise, scatter
from unimatrix.tasks.ruler.words import draw_letters

_NUM_HOPS = 4
_NAME_LETTERS = 5
_INTRO = "Keep track of the variables that are set in the text below.\n\n"
_QUESTION = (
    "\nQuestion: Which variables hold the value {value} in the text above?\n"
    "Answer: By the assignments in the text above, {count} variables hold the value {value}:"
)


@dataclass(frozen=True, kw_only=True)
class VariableTracking(LongTask):
    """One chain of 4 hops through 5 variables, scattered in order over noise.

    A worked example stands before the text. Variables are 5 capital letters, the value 5 digits.
    """

    max_new_bytes: ClassVar[int] = 120  # RULER: 30 tokens, of which a right answer takes 29 bytes.

    def __post_init__(self) -> None:
        longest = ["N" * _NAME_LETTERS] * (_NUM_HOPS + 1)
        worked = _work_example(longest, "1" * _NAME_LETTERS)
        lines = _assign(longest, "1" * _NAME_LETTERS)
        question = _ask("1" * _NAME_LETTERS)
        parts = (worked, *lines, question, _INTRO.encode())
        self.require_room(self.max_new_bytes + sum(map(len, parts)) + NUM_DEPTHS)

    def build(self, seed: int, index: int) -> LongExample:
        """Build one example; see ``LongTask.build``."""
        draws = Draws(seed, index)
        count = _NUM_HOPS + 1
        names: dict[str, None] = {}
        while len(names) < 2 * count:
            names[draw_letters(draws, string.ascii_uppercase, _NAME_LETTERS)] = None
        chosen = list(names)
        values = [str(10_000 + number) for number in draws.distinct(90_000, 2)]
        lines = _assign(chosen[:count], values[0])
        before = _work_example(chosen[count:], values[1]) + _INTRO.encode()
        after = _ask(values[0])
        room = self.total_bytes - self.max_new_bytes - len(before) - len(after)
        room -= sum(map(len, lines))
        depths = sorted(choose_depths(draws, index, count))
        prompt = before + scatter(repeat_noise(room), depths, lines) + after
        references = [name.encode() for name in chosen[:count]]
        return self.finish(prompt, references, [depth / (NUM_DEPTHS - 1) for depth in depths])


def _assign(names: Sequence[str], value: str) -> list[bytes]:
    """Return the assignments of a chain, a line each."""
    held = [value, *(f"VAR {name}" for name in names[:-1])]
    return [f"VAR {name} = {what}\n".encode() for name, what in zip(names, held, strict=True)]


def _ask(value: str) -> bytes:
    return _QUESTION.format(value=value, count=_NUM_HOPS + 1).encode()


def _work_example(names: Sequence[str], value: str) -> bytes:
    """Return a short text with its question and answer."""
    lines = _assign(names, value)
    answer = f" {' '.join(names)}\n\n".encode()
    return _INTRO.encode() + NOISE + b"".join(lines) + _ask(value) + answer
