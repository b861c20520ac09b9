"""Reading a text once, and answering questions about it with the passage behind each answer."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unimatrix.cache import UniMatrixCache, start_cache
from unimatrix.errors import InputError
from unimatrix.inference.generation import limit_threads, read_prompt
from unimatrix.inference.streams import require_state
from unimatrix.inference.suspend_training import suspend_training
from unimatrix.modeling import UniMatrixForCausalLM
from unimatrix.nn.indexed_attention import IndexedAttention
from unimatrix.ops.indexed_attention import find_entries
from unimatrix.ops.text_index import search_text
from unimatrix.tasks import NOT_IN_TEXT, frame_question
from unimatrix.tokenization import BOS_ID, EOS_ID, NUM_BYTES, PAD_ID, encode_bytes

ANSWER_BYTES = 64
"""An answer that does not end before is cut here."""
PASSAGE_BYTES = 96
"""About so many bytes of the text are shown around the place an answer was read from."""
TAIL_BYTES = 8192
"""The whole model reads so many bytes at the end of a text; the index alone reads those
before, of which matrix states would keep nothing: sixteen times the retention they begin with."""
_SKIMMED_BYTES = 2**16
_LONGEST_WORD = 16
_NEWLINE = ord("\n")


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What a model answered, and where it read the answer."""

    question: str
    """As it was asked."""
    data: bytes
    """The answer, at most ``ANSWER_BYTES``."""
    passage: bytes | None
    """The text around the place of the most attention while the first byte was chosen; ``None``
    where the answer is ``NOT_IN_TEXT``, or nothing was attended to."""
    bytes_back: int | None
    """How many bytes before the end of the text that place is; 1 is the last byte."""
    seconds: float
    """Wall seconds, without the reading of the text."""

    @property
    def text(self) -> str:
        """The answer as text, U+FFFD for what is no UTF-8."""
        return self.data.decode("utf-8", errors="replace")

    @property
    def is_refusal(self) -> bool:
        """Whether the model says that the text does not have the answer."""
        return self.data == NOT_IN_TEXT.encode()


class _Place(NamedTuple):
    """A place in the text, and what stands around it."""

    bytes_back: int
    passage: bytes


class TextReader:
    """Reads a text of any length in constant memory, and answers any number of questions.

    Every question continues the text, and none the other questions. Answers are greedy: the same
    text and question give the same answer. Of a long text the whole model reads the end
    (``TAIL_BYTES``), the index all.

    Args:
        model: a byte-level model with an index of the text (``associative_memory="indexed"``),
            trained with ``data.document_share``; its mode is restored after each call.
        window: bytes of the text that are remembered, the last of them; an even number, which
            stays the model's. ``None`` is the model's own.

    Raises:
        InputError: if the model has no such index, or has a position table, or there is no such
            window.
    """

    def __init__(self, model: UniMatrixForCausalLM, window: int | None = None) -> None:
        memory = model.config.associative_memory
        if memory != "indexed":
            raise InputError(
                f"the model has associative_memory {memory!r} and keeps no index of the text to "
                "answer from; give one trained with `unimatrix train reader`"
            )
        require_state(model)
        if window is not None:
            model.set_window(window)
        self.model = model
        self.bytes_read = 0
        self._waiting = bytearray()
        # Who asks knows the text, so that nothing counts it: the index alone would not.
        self._cache = replace(self._read_ids(torch.tensor([[BOS_ID]]), None), text_hash=None)

    @property
    def state_bytes(self) -> int:
        """The bytes that are carried, whatever the length of the text."""
        return self.catch_up().num_bytes()

    @property
    def window(self) -> int:
        """How many bytes of the text are remembered, the last of them."""
        window: int = self.model.config.automaton_window
        return window

    def read(self, data: bytes) -> None:
        """Read on, any bytes; the time is linear in them."""
        self.bytes_read += len(data)
        self._waiting += data
        # What waits is at most twice the tail, so that a byte is moved once at most.
        if len(self._waiting) > 2 * TAIL_BYTES and self._can_skim():
            num_skimmed = len(self._waiting) - TAIL_BYTES
            for start in range(0, num_skimmed, _SKIMMED_BYTES):
                self._skim(self._waiting[start : min(start + _SKIMMED_BYTES, num_skimmed)])
            del self._waiting[:num_skimmed]
        elif len(self._waiting) > 2 * TAIL_BYTES:
            self.catch_up()

    def catch_up(self) -> UniMatrixCache:
        """Let the whole model read what still waits, as ``ask`` does; return the cache after it."""
        if self._waiting:
            ids = torch.from_numpy(encode_bytes(self._waiting))[None]
            self._cache = self._read_ids(ids, self._cache)
            self._waiting.clear()
        return self._cache

    def ask(self, question: str) -> Answer:
        """Answer a question about all that was read so far.

        Args:
            question: in any words; bytes that are no UTF-8 may stand as surrogates.

        Raises:
            InputError: if the question has no words.
        """
        if not question.strip():
            raise InputError(f"the question is {question!r}; ask in words")
        cache, start = self.catch_up(), time.perf_counter()
        prompt = frame_question(question).encode("utf-8", errors="surrogateescape")
        ids = torch.from_numpy(encode_bytes(prompt))[None].to(self.model.device)
        with (
            suspend_training(self.model),
            limit_threads(self.model),
            watch_place(self.model) as places,
        ):
            output = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        with suspend_training(self.model), limit_threads(self.model):
            data = self._write(output)
        place = places[0] if places and data != NOT_IN_TEXT.encode() else None
        return Answer(
            question=question,
            data=data,
            passage=None if place is None else place.passage,
            bytes_back=None if place is None else place.bytes_back,
            seconds=time.perf_counter() - start,
        )

    def _can_skim(self) -> bool:
        """Whether nothing but the index has a long memory."""
        path = self.model.config.residual_path
        is_alone = set(self._cache.shared) == {IndexedAttention.name}
        return is_alone and path in ("none", "suffix_automaton")

    def _skim(self, data: bytearray) -> None:
        """Let the index read on alone; the states of the depth steps begin again."""
        config, cache = self.model.config, self._cache
        ids = torch.from_numpy(encode_bytes(data))[None]
        index = cache.shared[IndexedAttention.name]
        shared = {IndexedAttention.name: search_text(ids, initial=index, in_place=True)[1]}
        last_ids = ids[:, -1].to(self.model.device)
        self._cache = replace(
            start_cache(config, last_ids[None]),
            num_columns=cache.num_columns + len(data),
            num_tokens=cache.num_tokens + len(data),
            last_token_ids=last_ids,
            shared=shared,
            text_hash=None,
        )

    def _read_ids(self, ids: Tensor, cache: UniMatrixCache | None) -> UniMatrixCache:
        """Return the cache after more ids [1, T]; the one before is given up."""
        with suspend_training(self.model):
            ids = ids.to(self.model.device)
            after = read_prompt(self.model, ids, cache, gives_up_cache=cache is not None)
        assert after is not None
        return after

    def _write(self, output: Any) -> bytes:
        """Return the most likely bytes, up to the end of the line, of the text or of an answer."""
        written = bytearray()
        while True:
            logits = output.logits[0, -1].clone()
            logits[[PAD_ID, BOS_ID, *range(EOS_ID + 1, len(logits))]] = -torch.inf
            token_id = int(logits.argmax())
            if token_id in (_NEWLINE, EOS_ID):
                break
            written.append(token_id)
            if len(written) == ANSWER_BYTES:
                break
            output = self.model(
                torch.tensor([[token_id]], device=self.model.device),
                past_key_values=output.past_key_values,
                use_cache=True,
                gives_up_cache=True,
            )
        return bytes(written.strip())


@contextmanager
def watch_place(model: UniMatrixForCausalLM) -> Iterator[list[_Place]]:
    """Find the place in the text that the last token of a forward pass attends to most.

    Yields:
        a list that gets one place for each pass inside, or none where nothing is attended to. A
        pass has one row, continues a cache, and leaves it whole.
    """
    (mixer,) = (part for part in model.modules() if isinstance(part, IndexedAttention))
    found: list[_Place] = []

    def note(module: IndexedAttention, inputs: tuple[Any, ...], output: tuple[Any, Any]) -> None:
        tokens = inputs[1]
        text, places, *_ = tokens.found
        options = {"window": module.window, **module.operator_options}
        rows = find_entries(text, places[..., 0], **options).rows[0, -1]
        before = text[0, : -tokens.ids.shape[1]]
        place = _choose_place(before, rows, output[0].weights[0, -1].sum(dim=0))
        if place is not None:
            found.append(place)

    handle = mixer.register_forward_hook(note)
    try:
        yield found
    finally:
        handle.remove()


def _choose_place(before: Tensor, rows: Tensor, weights: Tensor) -> _Place | None:
    """Return the place in a text with the most weight; ``None`` if none has any.

    Args:
        before: [W] int64, the tokens of the text, -1 for none.
        rows: [E] int32, those of ``Entries``; what they name behind ``before`` is the question.
        weights: [E], of each entry, over all heads.
    """
    columns = (rows // 2).long()
    # Words of the question may have led to one place several times: its weights count together.
    is_text = (rows >= 0) & (columns < len(before))
    totals = torch.zeros(len(before), device=weights.device, dtype=weights.dtype)
    totals = totals.index_add(0, columns[is_text], weights[is_text])
    totals = totals.masked_fill((before < 0) | (before >= NUM_BYTES), 0)
    if not bool((totals > 0).any()):
        return None
    column = int(totals.argmax())
    return _Place(len(before) - column, _cut_passage(before.cpu(), column))


def _cut_passage(before: Tensor, column: int) -> bytes:
    """Return the bytes around a column of a text [W], from word to word where there are words."""
    start = max(0, column - PASSAGE_BYTES // 2)
    around = before[start : column + PASSAGE_BYTES // 2]
    is_byte = (around >= 0) & (around < NUM_BYTES)
    passage, offset = bytes(around[is_byte].tolist()), int(is_byte[: column - start].sum())
    is_cut_before = start > 0 and 0 <= int(before[start - 1]) < NUM_BYTES
    first = _find_space(passage[: min(offset, _LONGEST_WORD)]) if is_cut_before else 0
    last = len(passage)
    if start + len(around) < len(before):
        tail = passage[max(offset + 1, last - _LONGEST_WORD) :]
        last -= _find_space(tail[::-1])
    return passage[first:last].strip()


def _find_space(part: bytes) -> int:
    """Return how many bytes lead up to the first space; 0 where there is none."""
    return next((i for i, byte in enumerate(part) if byte in b" \n\t"), 0)
