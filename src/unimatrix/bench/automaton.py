"""The suffix automaton alone: bytes a second and bytes a token, on text and on the worst of it."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from unimatrix.bench.clock import Workload, choose_rounds, summarize, time_interleaved, time_once
from unimatrix.bench.equivalence import EquivalenceError
from unimatrix.bench.workloads import cut_rows
from unimatrix.evaluation.footprint import count_cache_bytes
from unimatrix.ops.suffix_automaton import predict_from_suffix

_CHECKED_TOKENS = 1024  # the reference is quadratic
_NUM_BYTES = 256


def _repeat_one(num_tokens: int) -> Tensor:
    """Return one byte again and again: matches as long as the text."""
    return torch.full((num_tokens,), 97)


def _write_fibonacci(num_tokens: int) -> Tensor:
    """Return the Fibonacci word, the most repetitive text that never repeats."""
    last, word = b"b", b"a"
    while len(word) < num_tokens:
        last, word = word, word + last
    return torch.frombuffer(bytearray(word[:num_tokens]), dtype=torch.uint8).long()


def _write_de_bruijn(num_tokens: int) -> Tensor:
    """Return a de Bruijn sequence over two bytes, which has every short text once.

    Source: Fredricksen and Maiorana 1978: the Lyndon words whose lengths divide n, in order.
    """
    n = max(1, (num_tokens - 1).bit_length())
    text, word = bytearray(), [-1]
    while word and len(text) < num_tokens:
        word[-1] += 1
        length = len(word)
        if n % length == 0:
            text += bytes(word)
        word = [word[i % length] for i in range(n)]
        while word and word[-1] == 1:
            word.pop()
    return torch.frombuffer(text[:num_tokens], dtype=torch.uint8).long()


def _draw_bytes(num_tokens: int) -> Tensor:
    """Return random bytes, whose automaton branches most."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, _NUM_BYTES, (num_tokens,), generator=generator)


_WORST: Mapping[str, Callable[[int], Tensor]] = {
    "one byte": _repeat_one,
    "Fibonacci word": _write_fibonacci,
    "de Bruijn": _write_de_bruijn,
    "random bytes": _draw_bytes,
}


def time_automaton(
    text: bytes, lengths: list[int], *, num_rounds: int, budget_s: float
) -> list[dict[str, Any]]:
    """Time the suffix automaton without a window on one stream, which one thread reads.

    Args:
        text: at least as many bytes as the greatest length.
        lengths: T, rising.
        num_rounds: of every text and length, if they fit the budget.
        budget_s: seconds that all rounds of a text and length may take.

    Returns:
        a row a text and length, as JSON types: seconds, bytes a second, and the bytes a token of
        the automaton that is carried on.

    Raises:
        EquivalenceError: if predictions differ from the reference's on the first 1,024 tokens.
    """
    streams: dict[tuple[str, int], Tensor] = {}
    for length in lengths:
        streams["text", length] = cut_rows(text, 1, length, _NUM_BYTES)
        for name, write in _WORST.items():
            streams[name, length] = write(length).unsqueeze(0)
    for (name, _), ids in streams.items():
        _require_exact(name, ids[:, :_CHECKED_TOKENS])
    workloads = {
        key: Workload(lambda: None, lambda _, ids=ids: predict_from_suffix(ids))  # type: ignore[misc]
        for key, ids in streams.items()
    }
    rounds = {
        key: choose_rounds(num_rounds, budget_s, time_once(workload, "cpu"))
        for key, workload in workloads.items()
    }
    seconds = time_interleaved(workloads, rounds, device="cpu")
    rows = []
    for (name, length), ids in streams.items():
        spread = summarize(seconds[name, length])
        _, state = predict_from_suffix(ids)
        rows.append(
            {
                "text": name,
                "num_tokens": length,
                **spread.to_milliseconds(),
                "bytes_per_s": length / spread.median,
                "state_bytes_per_token": count_cache_bytes(state) / length,
            }
        )
    return rows


def _require_exact(name: str, ids: Tensor) -> None:
    """Raise ``EquivalenceError`` unless predictions are those of the reference."""
    found, _ = predict_from_suffix(ids)
    expected, _ = predict_from_suffix(ids, backend="reference")
    if not all(map(torch.equal, found, expected)):
        raise EquivalenceError(
            f"suffix automaton: predictions on {name} differ from the reference's; it is not timed"
        )
