"""Bindings in text, asked for in other words: "The code of selim is 42", "Tell what ... selim"."""

import random
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from unimatrix.data.counter_random import draw_words
from unimatrix.errors import InputError
from unimatrix.tasks.seeded import SeededTask, label_positions, split_answer
from unimatrix.tasks.wordings import FEW, Wordings
from unimatrix.tokenization import BOS_ID, VOCAB_SIZE

_NUM_DIGITS = 7
_NUM_KEYS, _NUM_VALUE_DIGITS, _FILLER_BYTES = (1, 2, 3, 4, 6), (1, 2, 3, 7), (0, 0, 20, 60)
_PLAIN_SHARE, _PLAIN_BYTES, _ASIDE_SHARE, _ASIDE_BYTES = 0.25, 400, 0.4, 24
_MOST_LETTERS = 9
_HEX, _GROUPS = "0123456789abcdef", ((4, 4), (4, 4, 4), (3, 3, 3), (8, 4, 4, 4, 12))
_WORD = re.compile(rb"(?<![a-z])[a-z]{4,%d}(?![a-z])" % _MOST_LETTERS)
_BYTES_OF_NAMES = 3_000_000


def choose_names(text: NDArray[np.uint8], *, tests: bool) -> tuple[str, ...]:
    """Return the words of a text that are names in training, or those in tests: none is both.

    Args:
        text: [bytes] uint8, of which the first 3 MB are looked at.
        tests: whether the names are for tests.

    Raises:
        InputError: if there are fewer than 100.
    """
    words = {word.decode() for word in _WORD.findall(text[:_BYTES_OF_NAMES].tobytes())}
    names = tuple(sorted(word for word in words if zlib.crc32(word.encode()) % 2 == tests))
    if len(names) < 100:
        raise InputError(f"the text has {len(names)} words for names; give more text")
    return names


_Option = TypeVar("_Option")


class Draws:
    """Draws that are the same in every release of Python: made of ``Random.random`` alone."""

    def __init__(self, seed: int, index: int) -> None:
        words = draw_words(seed, np.array([index], dtype=np.int64), 1)
        self._random = random.Random(int(words[0, 0])).random

    def below(self, size: int) -> int:
        """Return a number of 0 to size - 1."""
        return int(self._random() * size)

    def choose(self, options: Sequence[_Option]) -> _Option:
        """Return one of the options; of a single one without a draw."""
        return options[self.below(len(options)) if len(options) > 1 else 0]

    def sample(self, options: Sequence[_Option], count: int) -> list[_Option]:
        """Return so many different options."""
        found: dict[int, _Option] = {}
        while len(found) < count:
            place = self.below(len(options))
            found.setdefault(place, options[place])
        return list(found.values())

    def shuffle(self, options: Sequence[_Option]) -> list[_Option]:
        """Return all options in a random order."""
        return self.sample(options, len(options))


@dataclass(frozen=True, eq=False)
class Bindings(SeededTask):
    """The base of both tasks: text, names, and how bindings are told and asked for.

    Raises:
        InputError: ``text`` is not [bytes] uint8, or shorter than ``window_bytes``.
    """

    window_bytes: int
    """T, input tokens in an example, BOS included."""
    text: NDArray[np.uint8] = field(repr=False)
    """[bytes] uint8, what stands between the bindings."""
    names: tuple[str, ...] = field(repr=False)
    """Names that values are bound to."""
    wordings: Wordings = field(default=FEW, repr=False)
    """How bindings are told and asked for."""

    vocab_size: ClassVar[int] = VOCAB_SIZE

    def __post_init__(self) -> None:
        if self.text.ndim != 1 or self.text.dtype != np.uint8:
            raise InputError(
                f"text has shape {self.text.shape} and type {self.text.dtype}; give one row of "
                "uint8."
            )
        if len(self.text) <= max(self.window_bytes, _PLAIN_BYTES):
            raise InputError(
                f"text has {len(self.text):,} bytes, too few for windows of "
                f"{self.window_bytes:,}; give more text or a smaller window_bytes."
            )

    def _draw_value(self, draws: Draws, num_digits: int) -> str:
        """Return a value of one of the kinds of ``Wordings``; a number has so many digits."""
        kind = draws.choose(self.wordings.kinds)
        if kind == "number":
            size = 10**num_digits
            return str(size // 10 + draws.below(size - size // 10))
        if kind == "hex":
            return "".join(draws.choose(_HEX) for _ in range(4 + draws.below(9)))
        if kind == "code":
            letters = "".join(draws.choose("ABCDEFGHJKLMNPQRSTUVWXYZ") for _ in range(2))
            return f"{letters}-{1000 + draws.below(9000)}"
        if kind == "amount":
            return f"{draws.below(10 ** (1 + draws.below(4)))}.{draws.below(100):02}"
        if kind == "identifier":
            sizes = draws.choose(_GROUPS)
            return "-".join("".join(draws.choose(_HEX) for _ in range(size)) for size in sizes)
        num_words = 1 if kind == "word" else 2 + draws.below(2)
        return " ".join(draws.choose(self.names) for _ in range(num_words))

    def _tell(self, draws: Draws, wording: str, key: str, value: str) -> str:
        """Return a sentence of the wordings about a key and its value."""
        aside = ""
        if "{aside}" in wording and draws.below(1000) < 1000 * _ASIDE_SHARE:
            cut = self._cut_filler(draws, _ASIDE_BYTES).decode(errors="ignore")
            aside = f", {' '.join(cut.split()[1:-1]).strip(',.;')},"
        noun = draws.choose(self.wordings.nouns)
        return wording.format(key=key, value=value, noun=noun, aside=aside)

    def _cut_filler(self, draws: Draws, num_bytes: int) -> bytes:
        """Return so many bytes from anywhere in the text, on one line."""
        start = draws.below(len(self.text) - num_bytes)
        return self.text[start : start + num_bytes].tobytes().replace(b"\n", b" ")

    def _build_windows(
        self, seed: int, indices: NDArray[np.int64], write: Callable[[Draws], bytes]
    ) -> dict[str, Tensor]:
        """Return windows, all of whose bytes have labels, as ``SeededTask.build_batch`` does.

        Args:
            seed, indices: as there.
            write: returns at least the bytes of one window; more are cut off.
        """
        windows = np.empty((len(indices), self.window_bytes), np.int64)
        for row, index in enumerate(indices):
            window = write(Draws(seed, int(index)))
            windows[row] = np.frombuffer(window[: self.window_bytes], np.uint8)
        ids = np.concatenate([np.full((len(indices), 1), BOS_ID), windows[:, :-1]], axis=1)
        return label_positions(ids, np.arange(self.window_bytes)[None], windows)


def count_longest_bytes(wordings: Wordings, num_keys: int) -> int:
    """Return the bytes of so many bindings and a question at most, without text between them."""
    longest = {
        "key": "n" * _MOST_LETTERS,
        "value": "1" * _NUM_DIGITS,
        "noun": max(wordings.nouns, key=len),
        "aside": "n" * (_ASIDE_BYTES + 3),
    }
    needle, question = (
        max(len(sentence.format(**longest)) for sentence in sentences) for sentences in wordings[:2]
    )
    return num_keys * (needle + 2) + question + 1


class BindingsText(Bindings):
    """Text to learn from: every byte of it has a label.

    Three quarters of the documents hold one to six bindings (their numbers have 1, 2, 3 or 7 digits
    each), with up to 60 bytes of text before each, and ask for all of them in other
    words and another order. A quarter is plain text. A window begins anywhere in a document.
    """

    def build_batch(self, seed: int, indices: NDArray[np.int64]) -> dict[str, Tensor]:
        """Build chosen windows; see ``SeededTask.build_batch``."""
        return self._build_windows(seed, indices, self._write_window)

    def _write_window(self, draws: Draws) -> bytes:
        """Return documents from anywhere in the first on."""
        document = self._write_document(draws)
        window = document[draws.below(len(document)) :]
        while len(window) < self.window_bytes:
            window += self._write_document(draws)
        return window

    def _write_document(self, draws: Draws) -> bytes:
        """Return one document and the empty line after it."""
        if draws.below(1000) < 1000 * _PLAIN_SHARE:
            return self._cut_filler(draws, _PLAIN_BYTES) + b"\n\n"
        names = draws.sample(self.names, draws.choose(_NUM_KEYS))
        num_digits = draws.choose(_NUM_VALUE_DIGITS)
        pairs = [(name, self._draw_value(draws, num_digits)) for name in names]
        told = []
        for name, value in pairs:
            filler = draws.choose(_FILLER_BYTES)
            if filler:
                told.append(self._cut_filler(draws, filler).rsplit(b" ", 1)[0])
            wording = draws.choose(self.wordings.needles)
            told.append(self._tell(draws, wording, name, value).encode())
        asked = [
            self._tell(draws, draws.choose(self.wordings.questions), name, value).encode()
            for name, value in draws.shuffle(pairs)
        ]
        return b" ".join(told) + b"\n" + b" ".join(asked) + b"\n\n"


@dataclass(frozen=True, eq=False)
class BindingsQuestion(Bindings):
    """A document of bindings of seven digits each, and one question: only the answer has labels.

    The bindings are spread evenly over the text.

    Raises:
        InputError: also if so many bindings do not fit.
    """

    num_keys: int = 1
    """Bindings in a document, one of which is asked for."""

    def __post_init__(self) -> None:
        super().__post_init__()
        shortest = count_longest_bytes(self.wordings, self.num_keys)
        if self.num_keys < 1 or self.window_bytes < shortest:
            raise InputError(
                f"num_keys is {self.num_keys} and window_bytes {self.window_bytes}; choose "
                f"at least 1 key and {shortest} bytes."
            )

    def build_batch(self, seed: int, indices: NDArray[np.int64]) -> dict[str, Tensor]:
        """Build chosen examples; see ``SeededTask.build_batch``."""
        documents = np.empty((len(indices), self.window_bytes), np.uint8)
        for row, index in enumerate(indices):
            document = self._write_document(Draws(seed, int(index)))
            documents[row] = np.frombuffer(document, np.uint8)
        return split_answer(documents, _NUM_DIGITS)

    def _write_document(self, draws: Draws) -> bytes:
        """Return text with the bindings, and the question with its answer at the end."""
        names = draws.sample(self.names, self.num_keys)
        smallest = 10 ** (_NUM_DIGITS - 1)
        values = [str(smallest + draws.below(9 * smallest)) for _ in names]
        needles = [
            f" {self._tell(draws, draws.choose(self.wordings.needles), *pair)} ".encode()
            for pair in zip(names, values, strict=True)
        ]
        asked = draws.below(self.num_keys)
        wording, _, _ = draws.choose(self.wordings.questions).partition("{value}")
        answer = self._tell(draws, f"{wording}{{value}}", names[asked], values[asked])
        question = f"\n{answer}".encode()
        room = self.window_bytes - len(question) - sum(map(len, needles))
        filler = self._cut_filler(draws, room)
        cuts = [len(filler) * i // (self.num_keys + 1) for i in range(self.num_keys + 2)]
        parts = [filler[cuts[0] : cuts[1]]]
        for needle, first, last in zip(needles, cuts[1:-1], cuts[2:], strict=True):
            parts += [needle, filler[first:last]]
        return b"".join(parts) + question
