"""Counting words: the most common of a list, the most frequent of a coded text.

Source: RULER ``data/synthetic/common_words_extraction.py`` and ``freq_words_extraction.py``; the
wording and words are our own.
"""

import math
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from unimatrix.tasks.ruler.example import Draws, LongExample, LongTask
from unimatrix.tasks.ruler.words import draw_letters, spell

_NUM_COMMON = 10
_WORD_LETTERS = 7
# RULER repeats less below 4,096 tokens; that is 16,384 bytes.
_LONG_BYTES = 16_384
_REPEATS = {True: (30, 3), False: (6, 1)}
_WORKED_REPEATS = (3, 1)
_SHORTEST_WORD = 6
_COMMON_INTRO = "Below is a numbered list of words. Some occur more often: keep those in mind.\n"
_COMMON_QUESTION = (
    "\nQuestion: What are the 10 most common words of the list?\n"
    "Answer: The 10 words that occur most often in the list are:"
)
_NUM_CODED = 2000
_CODED_LETTERS = 6
_NOISE_WORD = "..."
_ALPHA = 2.0
# From here on, rank 4 occurs more often than rank 5.
_FEWEST_WORDS = 74
_ZETA = math.pi**2 / 6  # The zeta function at _ALPHA.
_CODED_INTRO = "Count the coded words of the text below, without the dots.\n"
_CODED_QUESTION = (
    "\nQuestion: What are the three most frequent coded words of the text, without the dots?\n"
    "Answer: The three coded words that occur most often in the text are:"
)


@dataclass(frozen=True, kw_only=True)
class CommonWords(LongTask):
    """Find the 10 common words of a list in which the others are rare.

    Common words occur 30 times and the others 3 times; below 16,384 bytes 6 times and once. A
    worked example precedes the list. Words have 7 letters; a few longer or shorter words, once
    each, fill the list to its exact length.
    """

    max_new_bytes: ClassVar[int] = 480  # RULER: 120 tokens; an answer takes about 110 bytes.

    def __post_init__(self) -> None:
        repeats = _REPEATS[self.total_bytes >= _LONG_BYTES]
        word = "x" * _WORD_LETTERS
        worked = _NUM_COMMON * (sum(_WORKED_REPEATS) + 1)
        needed = len(_number([word] * worked)) + 2 * len(_COMMON_INTRO + _COMMON_QUESTION)
        # The list itself, with each common word and at least one other.
        needed += len(_number([word] * (_NUM_COMMON * repeats[0] + repeats[1])))
        self.require_room(self.max_new_bytes + needed + 3 * _SHORTEST_WORD)

    def build(self, seed: int, index: int) -> LongExample:
        """Build one example; see ``LongTask.build``."""
        draws = Draws(seed, index)
        repeats = _REPEATS[self.total_bytes >= _LONG_BYTES]
        taken: set[str] = set()
        worked = _draw_words(draws, 2 * _NUM_COMMON, taken)
        common = _draw_words(draws, _NUM_COMMON, taken)
        before = _work_example(worked, draws) + _COMMON_INTRO
        room = self.total_bytes - self.max_new_bytes - len(before) - len(_COMMON_QUESTION)
        words = common * repeats[0]
        num_fitting = _count_fitting(room, repeats[1], len(words))
        rare = _draw_words(draws, num_fitting, taken)
        words += rare * repeats[1]
        words += _fill(draws, room - len(_number(words)), len(words), taken)
        text = before + _number(draws.shuffled(words)) + _COMMON_QUESTION
        return self.finish(text.encode(), [word.encode() for word in common])


@dataclass(frozen=True, kw_only=True)
class FrequentWords(LongTask):
    """Find the 3 most frequent words of a coded text, in which only dots are more frequent.

    The word of rank k occurs n k^-2 / zeta(2) times, rounded down, of 2,000 coded words of 6
    letters; n is what fills the length, with dots for the rest.
    """

    max_new_bytes: ClassVar[int] = 200  # RULER: 50 tokens.

    def __post_init__(self) -> None:
        fewest = _measure_coded(_count_coded(_FEWEST_WORDS))
        self.require_room(self.total_bytes - self._measure_room() + fewest)

    def build(self, seed: int, index: int) -> LongExample:
        """Build one example; see ``LongTask.build``."""
        draws = Draws(seed, index)
        room = self._measure_room()
        counts = _choose_counts(room)
        coded: dict[str, None] = {}
        while len(coded) < len(counts) - 1:
            coded[draw_letters(draws, string.ascii_lowercase, _CODED_LETTERS)] = None
        num_dots, rest = divmod(room - _measure_coded(counts), len(_NOISE_WORD) + 1)
        words = [_NOISE_WORD] * (counts[0] + num_dots)
        words[0] += "." * rest
        for word, count in zip(coded, counts[1:], strict=True):
            words += [word] * count
        text = _CODED_INTRO + " ".join(draws.shuffled(words)) + _CODED_QUESTION
        return self.finish(text.encode(), [word.encode() for word in list(coded)[:3]])

    def _measure_room(self) -> int:
        return self.total_bytes - self.max_new_bytes - len(_CODED_INTRO) - len(_CODED_QUESTION)


def _draw_words(draws: Draws, count: int, taken: set[str]) -> list[str]:
    """Draw ``count`` words of 7 letters that are not in ``taken``, and add them."""
    words: list[str] = []
    while len(words) < count:
        word = spell(draws, _WORD_LETTERS)
        if word not in taken:
            taken.add(word)
            words.append(word)
    return words


def _number(words: Sequence[str]) -> str:
    """Return the words as a numbered list."""
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))


def _measure_item(number: int) -> int:
    """Return the bytes of an item without its word, the space before it included."""
    return len(f" {number}. ")


def _work_example(words: list[str], draws: Draws) -> str:
    """Return a short list with its question and answer; the first 10 words are the common ones."""
    common, rare = words[:_NUM_COMMON], words[_NUM_COMMON:]
    listed = draws.shuffled([*common * _WORKED_REPEATS[0], *rare * _WORKED_REPEATS[1]])
    return f"{_COMMON_INTRO}{_number(listed)}{_COMMON_QUESTION} {_number(common)}\n\n"


def _count_fitting(room: int, repeats: int, num_before: int) -> int:
    """Return how many more words fit, ``repeats`` times each, before a last item."""
    room -= _measure_item(10**9) + _SHORTEST_WORD
    room -= sum(_measure_item(n) + _WORD_LETTERS for n in range(1, num_before + 1))
    count = 0
    while True:
        first = num_before + count * repeats + 1
        room -= sum(_measure_item(n) + _WORD_LETTERS for n in range(first, first + repeats))
        if room < 0:
            return count
        count += 1


def _fill(draws: Draws, room: int, num_before: int, taken: set[str]) -> list[str]:
    """Return words that occur once and fill the room exactly, as items of the list."""
    words: list[str] = []
    while room:
        overhead = _measure_item(num_before + len(words) + 1)
        length = room - overhead
        if length >= _WORD_LETTERS + _measure_item(10**9) + _SHORTEST_WORD:
            length = _WORD_LETTERS
        word = spell(draws, length)
        if word not in taken:
            taken.add(word)
            words.append(word)
            room -= overhead + length
    return words


def _choose_counts(room: int) -> list[int]:
    """Return how often each rank occurs in the longest coded text that fits."""
    low, high = _FEWEST_WORDS, room
    while low < high:
        middle = (low + high + 1) // 2
        if _measure_coded(_count_coded(middle)) <= room:
            low = middle
        else:
            high = middle - 1
    return _count_coded(low)


def _count_coded(num_words: int) -> list[int]:
    """Return how often each rank occurs, dots first, as far as it occurs at all."""
    counts = [int(num_words / (_ZETA * rank**_ALPHA)) for rank in range(1, _NUM_CODED + 1)]
    return [count for count in counts if count]


def _measure_coded(counts: Sequence[int]) -> int:
    """Return the bytes of a coded text."""
    return counts[0] * (len(_NOISE_WORD) + 1) + sum(counts[1:]) * (_CODED_LETTERS + 1) - 1
