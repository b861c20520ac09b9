"""Documents for a reader: bindings that change, questions in a fixed frame, and refusals."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unimatrix.tasks.bindings import Bindings, Draws
from unimatrix.tasks.reader_wordings import READER, ReaderWordings
from unimatrix.tasks.wordings import Wordings

NOT_IN_TEXT = "not in the text"
"""What is answered where the text does not say."""

QUESTION_KINDS = ("told once", "latest", "first", "not told")
"""Kinds of questions: for a value told once, the latest or the first of several, or none."""

_NUM_KEYS, _NUM_VALUES, _NUM_QUESTIONS = (1, 2, 2, 3, 3, 4), (1, 1, 1, 2, 2, 3), (2, 3, 4, 4, 5, 6)
_MOST_DIGITS, _FILLER_BYTES, _LEAD_BYTES = 12, (0, 0, 0, 20, 40, 80), (0, 0, 0, 40)
_BYTES_A_KEY = 140
"""About so many bytes of a document are of one of its keys."""
_MENTIONS, _DISTRACTIONS = (0, 0, 0, 1, 2), (0, 0, 0, 1, 2)
_FRAME_SHARE, _REPLY_SHARE, _ABSENT_SHARE, _FIRST_SHARE, _ALL_SHARE = 0.65, 0.2, 0.2, 0.4, 0.15
_ALIKE_SHARE, _PLAIN_UPDATE_SHARE, _NEWLINE_SHARE, _CARELESS_SHARE = 0.4, 0.25, 0.25, 0.2
_FREE_SHARE, _OPENING_SHARE, _CLOSING_SHARE, _REQUEST_SHARE = 0.2, 0.25, 0.2, 0.2
_KEY_FORMS = (*("name",) * 4, *("Name",) * 3, "two names", "two names", "numbered", "hyphens")
_REPLIES = (
    "\nQuestion: {question}\nAnswer: ",
    "\nQ: {question}\nA: ",
    "\n{question}\n",
    "\n- {question}\n- ",
)
_MOST_PIECE_BYTES, _MOST_LIST_BYTES = 30, 60
_NO_PIECE = str.maketrans("", "", "0123456789{}")
"""What a piece of the text may not have: digits, and the marks of fields."""


def frame_question(question: str) -> str:
    """Return what stands before an answer: the question in the frame that a reader is trained on.

    The frame has no words, which an index would look for in the text.

    Args:
        question: in any words; line breaks and repeated spaces become one space.
    """
    return f"\n?? {' '.join(question.split())}\n>> "


def cut_question(wording: str) -> str:
    """Return the question of a wording, without the words that lead to its answer.

    Args:
        wording: a question of ``Wordings``, with ``{value}``.
    """
    asked = wording.partition("{value}")[0]
    for opening in ("Question: ", "Q: "):
        asked = asked.removeprefix(opening)
    for end in ("?", ". "):
        question, mark, _ = asked.partition(end)
        if mark:
            return question + mark.strip()
    return asked.rstrip(" :")


_LAST_NAME = re.compile(r"([-_ ]?)([^-_ ]+)$")
_FRAMED_ANSWER = re.compile(rb"\n>> ([^\n]*\n?)")


class _Binding(NamedTuple):
    """A key as it is told, and its values in their order; none for a key that has no value."""

    key: str
    values: tuple[str, ...]


class ReaderQuestion(NamedTuple):
    """A document, and one question about it.

    Attributes:
        text: of the document.
        question: in words, without the frame.
        answer: the right one.
        kind: of ``QUESTION_KINDS``.
    """

    text: bytes
    question: str
    answer: str
    kind: str


@dataclass(frozen=True, eq=False)
class ReaderText(Bindings):
    """Text for a reader to learn from: every byte of it has a label.

    A document tells one to four bindings, with text, numbers and names that nobody asks for between
    them, and then asks one question after the other. A key is a name, with or without a capital
    letter, two names, or a name with a number; two keys may look alike. A third of the keys get
    another value later: the last is what counts, unless the first is asked for. About a quarter
    of the questions are for keys that the text does not have, or mentions without a value: the
    answer is ``NOT_IN_TEXT``. Most questions stand in the frame of
    ``frame_question``. No key of a document is one of an earlier document in the same window, which
    begins with a document, or with some plain text before it.

    Note:
        Without the beginning of a document, a window would ask for keys that it does not tell.
        Plain text to learn from comes from elsewhere (``MixedWindows``).
    """

    wordings: Wordings = field(default=READER.bindings, repr=False)
    sentences: ReaderWordings = field(default=READER, repr=False)
    """Sentences beside those of ``wordings``."""
    answer_weight: float = 1.0
    """By which the bytes of an answer in the frame count in the loss; all others count 1."""

    def build_batch(self, seed: int, indices: NDArray[np.int64]) -> dict[str, Tensor]:
        """Build chosen windows; see ``SeededTask.build_batch``.

        Returns:
            also ``loss_weights`` [n, T] float32, if answers count differently.
        """
        batch = self._build_windows(seed, indices, self._write_window)
        if self.answer_weight != 1:
            batch["loss_weights"] = weights = torch.ones(batch["shift_labels"].shape)
            for row, targets in enumerate(batch["shift_labels"].numpy()):
                for answer in _FRAMED_ANSWER.finditer(targets.astype(np.uint8).tobytes()):
                    weights[row, slice(*answer.span(1))] = self.answer_weight
        return batch

    def draw_question(self, seed: int, index: int) -> ReaderQuestion:
        """Return a document of about ``window_bytes`` and a question; kinds take turns.

        Args:
            seed: >= 0.
            index: >= 0; the example is a pure function of (task, seed, index).
        """
        draws, told = Draws(seed, index), set[str]()
        kind = QUESTION_KINDS[index % len(QUESTION_KINDS)]
        keys = self._draw_keys(draws, told)
        bindings = [_Binding(key, self._draw_values(draws)) for key in keys]
        key, values = bindings[0]
        while (len(values) > 1) != (kind in ("latest", "first")):
            values = self._draw_values(draws)
        bindings[0] = _Binding(key, values)
        if kind == "not told":
            key = self._draw_absent(draws, keys, told)
        parts = self._tell_all(
            draws, bindings, [key][: draws.below(2)] if kind == "not told" else []
        )
        answers = {"told once": values[0], "latest": values[-1], "first": values[0]}
        asks_first = kind == "first"
        questions = self.sentences.first_questions if asks_first else self.wordings.questions
        question = self._tell(draws, cut_question(draws.choose(questions)), key, "")
        text = self._spread(draws, parts)
        return ReaderQuestion(text, question, answers.get(kind, NOT_IN_TEXT), kind)

    def _spread(self, draws: Draws, parts: Sequence[str]) -> bytes:
        """Return sentences evenly spread over text, ``window_bytes`` together where they fit."""
        told = [part.encode() for part in parts]
        filler = self._cut_filler(draws, max(0, self.window_bytes - sum(map(len, told))))
        cuts = [len(filler) * i // (len(told) + 1) for i in range(len(told) + 2)]
        text = filler[: cuts[1]]
        for part, first, last in zip(told, cuts[1:-1], cuts[2:], strict=True):
            text += b" " + part + b" " + filler[first:last]
        return text

    def _write_window(self, draws: Draws) -> bytes:
        """Return documents, one after the other."""
        window = self._cut_words(draws, draws.choose(_LEAD_BYTES))
        told: set[str] = set()
        while len(window) < self.window_bytes:
            window += self._write_document(draws, told)
        return window

    def _write_document(self, draws: Draws, told: set[str]) -> bytes:
        """Return a document and the empty line after it.

        Args:
            draws: of the window.
            told: words of the keys so far, to which those of this document are added.
        """
        bindings = [_Binding(key, self._draw_values(draws)) for key in self._draw_keys(draws, told)]
        absent = [
            self._draw_absent(draws, [binding.key for binding in bindings], told) for _ in range(2)
        ]
        # The absent key that is asked for first is mentioned, or none is.
        parts = self._tell_all(draws, bindings, absent[1 + draws.below(2) :])
        text = "".join(part + ("\n" if _happens(draws, _NEWLINE_SHARE) else " ") for part in parts)
        return f"{text.rstrip()}{self._ask_all(draws, bindings, absent)}\n\n".encode()

    def _tell_all(
        self, draws: Draws, bindings: Sequence[_Binding], mentioned: Sequence[str]
    ) -> list[str]:
        """Return the sentences before the questions, in their order, with text between them."""
        turns = draws.shuffle([i for i, (_, values) in enumerate(bindings) for _ in values])
        parts: list[str] = []
        for turn, number in enumerate(turns):
            key, values = bindings[number]
            place = turns[:turn].count(number)
            is_plain = place == 0 or _happens(draws, _PLAIN_UPDATE_SHARE)
            wording = self._draw_needle(draws, values[place]) if is_plain else ""
            wording = wording or draws.choose(self.sentences.updates)
            parts += [*self._fill(draws), self._tell(draws, wording, key, values[place])]
        sides = [self._distract(draws) for _ in range(draws.choose(_DISTRACTIONS))]
        for _ in range(draws.choose(_MENTIONS)):
            wording = draws.choose(self.sentences.mentions)
            sides.append(self._tell(draws, wording, draws.choose(bindings).key, ""))
        for key in mentioned:
            wording = draws.choose((*self.sentences.mentions, *self.sentences.denials))
            sides.append(self._tell(draws, wording, key, ""))
        for side in sides:
            parts.insert(draws.below(len(parts) + 1), side)
        return [*parts, *self._fill(draws)]

    def _draw_needle(self, draws: Draws, value: str) -> str:
        """Return a sentence that tells a binding: of the wordings, or of pieces of the text.

        What is no word stands out from a text, so that pieces of it may be all that is around.
        """
        if any(map(str.isdigit, value)) and _happens(draws, _FREE_SHARE):
            fields = draws.shuffle(("{key}", "{value}"))
            pieces = [self._cut_piece(draws) for _ in range(3)]
            return f"{pieces[0]} {fields[0]} {pieces[1]} {fields[1]} {pieces[2]}".strip()
        wording = draws.choose(self.wordings.needles)
        if _happens(draws, _OPENING_SHARE):
            opening, first = draws.choose(self.sentences.openings), wording.split()[0]
            if first.isalpha() and first != "I":
                wording = wording[0].lower() + wording[1:]
            wording = opening + wording
        if wording.endswith(".") and _happens(draws, _CLOSING_SHARE):
            wording = wording[:-1] + draws.choose(self.sentences.closings)
        return wording

    def _cut_piece(self, draws: Draws) -> str:
        """Return a few words of the text without digits, or none."""
        words = self._cut_words(draws, draws.below(_MOST_PIECE_BYTES)).decode(errors="ignore")
        return " ".join(words.translate(_NO_PIECE).split()[1:])

    def _ask_all(self, draws: Draws, bindings: Sequence[_Binding], absent: Sequence[str]) -> str:
        """Return questions with their answers, each key at most once."""
        known = draws.shuffle(bindings)
        unknown = [_Binding(key, ()) for key in absent]
        asked = ""
        for _ in range(draws.choose(_NUM_QUESTIONS)):
            is_absent = _happens(draws, _ABSENT_SHARE)
            left = unknown if is_absent else known
            if left:
                asked += self._ask(draws, left.pop(), asked)
        return asked

    def _ask(self, draws: Draws, binding: _Binding, before: str) -> str:
        """Return a question with its answer, in the frame or as a sentence behind those before."""
        key, values = binding
        questions, answer = self._choose_answer(draws, values)
        key = draws.choose((key, key.lower()))
        form = draws.below(1000) / 1000
        if form < _FRAME_SHARE + _REPLY_SHARE:
            is_usual = questions is self.wordings.questions
            if is_usual and _happens(draws, _FREE_SHARE):
                question = f"{self._cut_piece(draws)} {{key}} {self._cut_piece(draws)}?".strip()
            else:
                question = cut_question(draws.choose(questions))
            if _happens(draws, _REQUEST_SHARE):
                question = draws.choose(self.sentences.requests) + question
            question = _type_carelessly(draws, self._tell(draws, question, key, ""))
            if form < _FRAME_SHARE:
                return f"{frame_question(question)}{answer}\n"
            lead = draws.choose(self.sentences.leads) if values else ""
            lead = self._tell(draws, lead, key, "")
            return f"{draws.choose(_REPLIES).format(question=question)}{lead}{answer}.\n"
        if not values:
            # What may also tell a value, such as "{key}: {value}.", asks for none that is not.
            questions = tuple(wording for wording in questions if "?" in wording)
        gap = "\n" if not before else "" if before.endswith("\n") else " "
        return gap + self._tell(draws, draws.choose(questions), key, answer)

    def _choose_answer(self, draws: Draws, values: tuple[str, ...]) -> tuple[tuple[str, ...], str]:
        """Return the questions for the latest of some values, the first or all, and the answer."""
        if len(values) > 1:
            kind = draws.below(1000) / 1000
            if kind < _FIRST_SHARE:
                return self.sentences.first_questions, values[0]
            together = ", ".join(values)
            if kind < _FIRST_SHARE + _ALL_SHARE and len(together) <= _MOST_LIST_BYTES:
                return self.sentences.all_questions, together
        return self.wordings.questions, values[-1] if values else NOT_IN_TEXT

    def _draw_values(self, draws: Draws) -> tuple[str, ...]:
        """Return the values of a key in their order, all different."""
        count = draws.choose(_NUM_VALUES)
        values: list[str] = []
        while len(values) < count:
            value = self._draw_value(draws, 1 + draws.below(_MOST_DIGITS))
            if value not in values:
                values.append(value)
        return tuple(values)

    def _draw_keys(self, draws: Draws, told: set[str]) -> list[str]:
        """Return keys of which no word is told so far, but those of two that look alike."""
        keys: list[str] = []
        most = max(1, self.window_bytes // _BYTES_A_KEY)
        for _ in range(min(draws.choose(_NUM_KEYS), most)):
            looks_alike = keys and _happens(draws, _ALIKE_SHARE)
            key = (
                self._look_alike(draws, keys[-1], told)
                if looks_alike
                else self._draw_key(draws, told)
            )
            keys.append(key)
        return keys

    def _draw_absent(self, draws: Draws, keys: Sequence[str], told: set[str]) -> str:
        """Return a key that has no value; it may look like one of those that have."""
        if _happens(draws, _ALIKE_SHARE):
            return self._look_alike(draws, draws.choose(keys), told)
        return self._draw_key(draws, told)

    def _draw_key(self, draws: Draws, told: set[str]) -> str:
        """Return a new key of one of the forms, and add its words to those told."""
        while True:
            form, name = draws.choose(_KEY_FORMS), draws.choose(self.names)
            if form == "Name":
                name = name.capitalize()
            elif form == "two names":
                name += f" {draws.choose(self.names)}"
            elif form == "numbered":
                name += f" {1 + draws.below(99)}"
            elif form == "hyphens":
                parts = [name, *(draws.choose(self.names) for _ in range(1 + draws.below(2)))]
                name = draws.choose("-_").join(parts)
            words = re.findall("[a-z]+", name.lower())
            if not told.intersection([name.lower(), *words]):
                told.update([name.lower(), *words])
                return name

    def _look_alike(self, draws: Draws, key: str, told: set[str]) -> str:
        """Return a new key that differs from another in a letter, its number or its last name."""
        head, mark, last, _ = _LAST_NAME.split(key)
        while True:
            if last.isdigit():
                changed = str(1 + draws.below(99))
            elif head:
                changed = draws.choose(self.names)
            else:
                place = 1 + draws.below(len(last) - 1)
                letter = chr(ord("a") + draws.below(26))
                changed = last[:place] + letter + last[place + 1 :]
            alike = head + mark + changed
            if alike.lower() not in told:
                told.add(alike.lower())
                return alike

    def _distract(self, draws: Draws) -> str:
        """Return a sentence with numbers and names that are bound to nothing."""
        sentence = draws.choose(self.sentences.distractions)
        while "{name}" in sentence:
            sentence = sentence.replace("{name}", draws.choose(self.names).capitalize(), 1)
        size = 10 ** (1 + draws.below(6))
        return sentence.format(number=size // 10 + draws.below(size - size // 10))

    def _fill(self, draws: Draws) -> list[str]:
        """Return a piece of the text, longer in a longer window, or nothing."""
        sizes = (*_FILLER_BYTES, self.window_bytes // 8)
        words = self._cut_words(draws, draws.choose(sizes)).decode(errors="ignore").strip()
        return [words] if words else []

    def _cut_words(self, draws: Draws, num_bytes: int) -> bytes:
        """Return at most so many bytes of the text on one line, up to the end of a word."""
        if num_bytes == 0:
            return b""
        return self._cut_filler(draws, num_bytes).rpartition(b" ")[0] + b" "


def _happens(draws: Draws, share: float) -> bool:
    """Draw whether what has a share of the cases happens."""
    return draws.below(1000) < 1000 * share


def _type_carelessly(draws: Draws, question: str) -> str:
    """Return a question that may lack its capital letter or its mark, as people type them."""
    if _happens(draws, _CARELESS_SHARE):
        question = question[0].lower() + question[1:]
    if _happens(draws, _CARELESS_SHARE):
        question = question.rstrip("?.")
    return question
