"""A needle in a haystack: one sentence with a number somewhere in a text, asked for at the end."""

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from unimatrix.errors import InputError
from unimatrix.tasks.draws import draw_columns, reduce_words
from unimatrix.tasks.seeded import SeededTask, split_answer
from unimatrix.tokenization import VOCAB_SIZE

_NUM_DIGITS = 7
_NAME_LETTERS = range(5, 9)


@dataclass(frozen=True, eq=False)
class Needle(SeededTask):
    r"""Hide ``The secret number of <Name> is <7 digits>.`` in text and ask for the digits.

    A document of T bytes is a random window of the text, over which the sentence is written, then
    ``\nThe secret number of <Name> is `` and the 7 digits. The input is BOS and the first T - 1
    bytes, and the labels are the digits on the last 7 positions: greedy decoding gives the number
    if and only if all 7 labels have the largest logit. The name is 5 to 8 random letters, the first
    a capital; the number has no leading zero.

    Example i has depth d = i mod 10: the sentence starts at d / 9 of the room it has, rounded to a
    byte, so depth 0 is the start of the window and depth 9 ends where the question begins.

    Decoys, for training, are other numbers at random places of the text, a space and 1 to 7 digits
    each, so that digits alone do not tell what will be asked for. The sentence may cover some.

    Raises:
        InputError: ``text`` is not [bytes] uint8 of at least ``window_bytes``, or these are too
            few for sentence and question, or ``num_decoys`` is negative.
    """

    window_bytes: int
    """T, input tokens in an example, BOS, question and six digits included."""
    text: NDArray[np.uint8] = field(repr=False)
    """[bytes] uint8, the haystack; read, never written, so a mapped file will do."""
    num_decoys: int = 0
    """Other numbers written over the text, none in the task as it is tested."""

    NUM_DEPTHS: ClassVar[int] = 10
    vocab_size: ClassVar[int] = VOCAB_SIZE

    def __post_init__(self) -> None:
        longest_name, longest_number = "N" * _NAME_LETTERS[-1], 10**_NUM_DIGITS - 1
        sentence, question = _phrase(longest_name, longest_number)
        shortest = len(sentence) + len(question)
        if self.window_bytes < shortest:
            raise InputError(
                f"window_bytes is {self.window_bytes}, too short for sentence and question; choose "
                f"at least {shortest}."
            )
        if self.num_decoys < 0:
            raise InputError(f"num_decoys is {self.num_decoys}; it must be at least 0.")
        if self.text.ndim != 1 or self.text.dtype != np.uint8:
            raise InputError(
                f"text has shape {self.text.shape} and type {self.text.dtype}; give one row of "
                "uint8."
            )
        if len(self.text) < self.window_bytes:
            raise InputError(
                f"text has {len(self.text):,} bytes, too few for windows of "
                f"{self.window_bytes:,}; give more text or a smaller window_bytes."
            )

    def build_batch(self, seed: int, indices: NDArray[np.int64]) -> dict[str, Tensor]:
        """Build chosen examples; see ``SeededTask.build_batch``."""
        length_words, letter_words, number_words, start_words, decoy_words = draw_columns(
            seed, indices, [1, _NAME_LETTERS[-1], 1, 1, 3 * self.num_decoys]
        )
        lengths = _NAME_LETTERS.start + reduce_words(length_words, len(_NAME_LETTERS))[:, 0]
        letters = ord("a") + reduce_words(letter_words, 26)
        smallest = 10 ** (_NUM_DIGITS - 1)
        numbers = smallest + reduce_words(number_words, 9 * smallest)[:, 0]
        documents = np.empty((len(indices), self.window_bytes), np.uint8)
        for row, index in enumerate(indices):
            name = bytes(letters[row, : lengths[row]].tolist()).decode().capitalize()
            sentence, question = _phrase(name, int(numbers[row]))
            room = self.window_bytes - len(question)
            start = int(start_words[row, 0]) % (len(self.text) - room + 1)
            documents[row, :room] = self.text[start : start + room]
            documents[row, room:] = question
            _write_decoys(documents[row, :room], decoy_words[row])
            depth = int(index) % self.NUM_DEPTHS
            first = round(depth * (room - len(sentence)) / (self.NUM_DEPTHS - 1))
            documents[row, first : first + len(sentence)] = sentence
        return split_answer(documents, _NUM_DIGITS)


def _write_decoys(text: NDArray[np.uint8], words: NDArray[np.uint64]) -> None:
    """Write numbers over a text: three words for each number's digits, value and place."""
    num_digits = 1 + reduce_words(words[0::3], _NUM_DIGITS)
    values = reduce_words(words[1::3], 10**_NUM_DIGITS)
    places = reduce_words(words[2::3], len(text) - _NUM_DIGITS)
    for count, value, place in zip(num_digits, values, places, strict=True):
        decoy = f" {value:0{_NUM_DIGITS}}"[: count + 1].encode()
        text[place : place + len(decoy)] = np.frombuffer(decoy, np.uint8)


def _phrase(name: str, number: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return the bytes of the sentence, and of the question with its answer."""
    told = f"The secret number of {name} is {number}"
    sentence, question = f"{told}.".encode(), f"\n{told}".encode()
    return np.frombuffer(sentence, np.uint8), np.frombuffer(question, np.uint8)
