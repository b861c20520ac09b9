"""Models on long texts: RULER's tasks over bytes, and bits per byte by position."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unimatrix.data import ByteStream
from unimatrix.evaluation.byte_costs import cost_targets
from unimatrix.evaluation.readers import Reader
from unimatrix.evaluation.units import to_bits_per_byte
from unimatrix.tasks.ruler import LongTask, score_references

_FIRST_BIN_BYTES = 128
_SHOWN_BYTES = 200

Progress = Callable[[], None]


def measure_task(
    reader: Reader,
    task: LongTask,
    num_examples: int,
    seed: int,
    *,
    on_example: Progress = lambda: None,
) -> dict[str, Any]:
    """Return how well a model does a long-context task, greedily.

    Writing ends once all references are found, since more bytes cannot change the score.

    Args:
        task: makes the examples 0..n-1 of the seed.
        num_examples: >= 1.
        seed: >= 0.

    Returns:
        ``score``, the mean share of references found; ``examples``; ``by_example``, the depth of
        the first needle (``None`` without needles) and the score of each; ``first``, references and
        answer of example 0, to look at; ``seconds``.

    Raises:
        TooLongError: the model cannot read the examples.
    """
    start = time.perf_counter()
    by_example: list[list[float | None]] = []
    first: dict[str, Any] = {}
    for index in range(num_examples):
        example = task.build(seed, index)
        references = example.references
        is_over = partial(_hold_all, references)
        answer = reader.complete(example.prompt, example.max_new_bytes, is_over)
        if not first:
            shown = answer[:_SHOWN_BYTES].decode("utf-8", errors="replace")
            first = {"references": [r.decode() for r in references], "answer": shown}
        depth = example.depths[0] if example.depths else None
        by_example.append([depth, score_references(answer, references)])
        on_example()
    scores = [score for _, score in by_example if score is not None]
    return {
        "score": sum(scores) / len(scores),
        "examples": num_examples,
        "by_example": by_example,
        "first": first,
        "seconds": round(time.perf_counter() - start, 3),
    }


def _hold_all(references: Sequence[bytes], answer: bytes) -> bool:
    return score_references(answer, references) == 1


def measure_positions(reader: Reader, stream: ByteStream, limit_bytes: int) -> dict[str, Any]:
    """Return bits per byte of a text by position, in bins that double.

    Args:
        reader: the model; what each byte sees is the rule of ``byte_costs``.
        stream: at least one byte.
        limit_bytes: the most to read, from the start.

    Returns:
        ``bits_per_byte`` of all ``bytes``; ``by_position``: first byte, end and bits per byte of
        each bin; ``context``; ``seconds``.
    """
    start = time.perf_counter()
    data = stream.read(0, min(len(stream), limit_bytes)).tobytes()
    tokens = reader.encode(data)
    nats, context = reader.score(tokens, cost_targets)
    num_bytes = int(tokens.ends[-1])
    return {
        "bits_per_byte": to_bits_per_byte(float(nats.sum(dtype=np.float64)), num_bytes),
        "bytes": num_bytes,
        "by_position": bin_by_position(nats, tokens.ends),
        "context": context,
        "seconds": round(time.perf_counter() - start, 3),
    }


def bin_by_position(nats: NDArray[np.float32], ends: NDArray[np.int64]) -> list[list[float]]:
    """Return first byte, end and mean bits per byte of bins that double.

    Args:
        nats: [n], of each token.
        ends: [n], bytes up to the end of each token, rising; a token belongs to the bin of its
            first byte.
    """
    starts = np.concatenate([[0], ends[:-1]])
    bins: list[list[float]] = []
    first, end = 0, _FIRST_BIN_BYTES
    while first < ends[-1]:
        inside = (starts >= first) & (starts < end)
        if inside.any():
            num_bytes = int((ends - starts)[inside].sum())
            bits = to_bits_per_byte(float(nats[inside].sum(dtype=np.float64)), num_bytes)
            bins.append([first, min(end, int(ends[-1])), round(bits, 5)])
        first, end = end, 2 * end
    return bins
