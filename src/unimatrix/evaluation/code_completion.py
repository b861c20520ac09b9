"""Code completion on held-out sources: the next line, and names copied from far above."""

import builtins
import io
import keyword
import re
import time
import tokenize
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unimatrix.errors import InputError
from unimatrix.evaluation.byte_costs import hit_targets
from unimatrix.evaluation.readers import Reader, Tokens, TooLongError
from unimatrix.tasks.ruler.example import Draws

FAR_BYTES = 2000
"""The least distance of a name from its last earlier occurrence."""
MOST_LINE_BYTES = 120
"""Longer lines are not asked for."""
KNOWN_BYTES = 3
"""The rest of a name after this many bytes is judged too."""
_FEWEST_NAME_BYTES = 4
_FEWEST_LINE_BYTES = 8
_WORD = re.compile(rb"[A-Za-z_][A-Za-z0-9_]*")
_COMMON_WORDS = frozenset({*keyword.kwlist, *keyword.softkwlist, *dir(builtins)})

Progress = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Place:
    """Bytes ``start`` to ``stop`` of a source: a line or a name."""

    source: str
    start: int
    stop: int


def list_lines(sources: Mapping[str, bytes]) -> list[Place]:
    """Return the lines of sources that can be asked for, in order.

    They stand ``FAR_BYTES`` or more below the start of their source, are no comment, and have 8 to
    120 bytes besides indentation and line end.
    """
    places = []
    for name, data in sources.items():
        start = 0
        for line in io.BytesIO(data).readlines():
            text = line.strip()
            is_fit = len(text) >= _FEWEST_LINE_BYTES and len(line) <= MOST_LINE_BYTES
            if start >= FAR_BYTES and is_fit and not text.startswith(b"#"):
                places.append(Place(name, start, start + len(line.rstrip(b"\r\n"))))
            start += len(line)
    return places


def list_far_names(data: bytes) -> list[tuple[int, int]]:
    """Return the names in a Python source whose last earlier occurrence is far above.

    A name is an identifier of 4 bytes or more that is no keyword and no builtin; an occurrence is a
    whole word anywhere above, comments and strings included. A source that does not tokenize has no
    names.

    Returns:
        first byte and end of each, in order.
    """
    last_ends: dict[bytes, int] = {}
    before: dict[int, int] = {}
    for match in _WORD.finditer(data):
        if match[0] in last_ends:
            before[match.start()] = last_ends[match[0]]
        last_ends[match[0]] = match.end()
    return [
        (start, stop)
        for start, stop in _list_names(data)
        if start in before and start - before[start] >= FAR_BYTES
    ]


def measure_lines(
    reader: Reader,
    sources: Mapping[str, bytes],
    num_examples: int,
    seed: int,
    *,
    context_bytes: int,
    on_example: Progress = lambda: None,
) -> dict[str, Any]:
    """Return how often a model writes the next line exactly, indentation included.

    Args:
        sources: held-out sources by name.
        num_examples: lines drawn with ``seed``, without repetition.
        seed: of the draw.
        context_bytes: the most to read above a line, unless the model can read less.
        on_example: called after each line.

    Returns:
        ``exact_match`` over ``examples`` lines; ``context_bytes``, the most read above a line.

    Raises:
        TooLongError: if the model cannot read a byte above a line.
        InputError: if there are too few lines.
    """
    places = list_lines(sources)
    if len(places) < num_examples:
        raise InputError(
            f"the sources have {len(places):,} lines to complete, fewer than {num_examples:,}; ask "
            "for fewer or give more"
        )
    start = time.perf_counter()
    chosen = Draws(seed, 0).distinct(len(places), num_examples)
    num_right, used = 0, context_bytes
    if reader.limit_tokens is not None and reader.tokenizer is None:
        used = min(used, reader.limit_tokens - MOST_LINE_BYTES)
    for number in chosen:
        place = places[number]
        data = sources[place.source]
        line = data[place.start : place.stop]
        answer, used = _write_line(reader, data[: place.start], used)
        num_right += answer.split(b"\n", 1)[0].rstrip(b"\r") == line
        on_example()
    return {
        "exact_match": num_right / num_examples,
        "examples": num_examples,
        "context_bytes": used,
        "seconds": round(time.perf_counter() - start, 3),
    }


def measure_far_names(
    reader: Reader,
    sources: Mapping[str, bytes],
    num_examples: int,
    *,
    most_bytes: int,
    on_source: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """Return how often every byte of a name from far above has the largest logit.

    Sources are read in their order, each from its start, with the true bytes before every byte,
    until there are names enough.

    Args:
        sources: held-out Python sources by name.
        num_examples: the most names to judge.
        most_bytes: the most bytes to read of a source.
        on_source: called with the number of names done, after each source.

    Returns:
        ``accuracy`` over ``examples`` names; ``rest_accuracy``, given the first 3 bytes, over those
        ``rest_examples`` that are longer; both ``None`` without names.
    """
    start = time.perf_counter()
    whole: list[bool] = []
    rests: list[bool] = []
    context = ""
    for data in sources.values():
        if len(whole) == num_examples:
            break
        names = [pair for pair in list_far_names(data[:most_bytes]) if pair[1] <= most_bytes]
        names = names[: num_examples - len(whole)]
        if names:
            tokens = reader.encode(data[: names[-1][1]])
            hits, context = reader.score(tokens, hit_targets)
            whole += [_judge(tokens, hits, *name) for name in names]
            found = [_judge_rest(tokens, hits, *name) for name in names]
            rests += [is_right for is_right in found if is_right is not None]
            on_source(len(whole))
    return {
        "accuracy": float(np.mean(whole)) if whole else None,
        "examples": len(whole),
        "rest_accuracy": float(np.mean(rests)) if rests else None,
        "rest_examples": len(rests),
        "context": context,
        "seconds": round(time.perf_counter() - start, 3),
    }


def _write_line(reader: Reader, above: bytes, context_bytes: int) -> tuple[bytes, int]:
    """Return the next line and the bytes of context, halved until the model can read them."""
    while context_bytes > 0:
        try:
            prompt = above[-context_bytes:]
            return reader.complete(prompt, MOST_LINE_BYTES, lambda d: b"\n" in d), context_bytes
        except TooLongError:
            context_bytes = min(context_bytes, len(above)) // 2
    raise TooLongError(f"cannot write a line of {MOST_LINE_BYTES} bytes after a byte")


def _judge(tokens: Tokens, hits: NDArray[np.float32], first: int, stop: int) -> bool:
    """Return whether all tokens with a byte of a name are right."""
    starts = np.concatenate([[0], tokens.ends[:-1]])
    return bool(hits[(starts < stop) & (tokens.ends > first)].all())


def _judge_rest(tokens: Tokens, hits: NDArray[np.float32], first: int, stop: int) -> bool | None:
    """Return whether all tokens after the first bytes are right; ``None`` if there are none."""
    starts = np.concatenate([[0], tokens.ends[:-1]])
    inside = (starts >= first + KNOWN_BYTES) & (starts < stop)
    return bool(hits[inside].all()) if inside.any() else None


def _list_names(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield first byte and end of the identifiers of a Python source."""
    lines = io.BytesIO(data).readlines()
    offsets = np.concatenate([[0], np.cumsum([len(line) for line in lines])])
    try:
        for token in tokenize.tokenize(io.BytesIO(data).readline):
            if token.type != tokenize.NAME or token.string in _COMMON_WORDS:
                continue
            row, column = token.start
            before = lines[row - 1].decode("utf-8")[:column]
            start = int(offsets[row - 1]) + len(before.encode())
            length = len(token.string.encode())
            if length >= _FEWEST_NAME_BYTES:
                yield start, start + length
    except (tokenize.TokenError, SyntaxError, UnicodeDecodeError):
        return
