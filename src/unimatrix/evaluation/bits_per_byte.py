"""Bits per byte: what it costs to send a stream with a model's predictions."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from unimatrix.cache import UniMatrixCache, start_cache
from unimatrix.data import ByteStream
from unimatrix.errors import InputError
from unimatrix.evaluation.modes import suspend_training
from unimatrix.evaluation.units import to_bits_per_byte
from unimatrix.modeling import UniMatrixForCausalLM
from unimatrix.stream_matches import read_with_automaton
from unimatrix.tokenization import BOS_ID, encode_bytes

Progress = Callable[[int], None]

_Score = tuple[float, int, UniMatrixCache | None]

PRIME_TOKENS = 65_536
"""Of a text read first, a model whose only long memory is the suffix automaton reads the last so
many bytes, and the automaton alone those before: matrix states do not remember that far."""


class BitsPerByte(NamedTuple):
    """What a stream costs.

    Attributes:
        bits_per_byte: mean over the bytes predicted; BOS and EOS cost nothing.
        bytes: how many bytes were predicted.
        context: ``carried`` (each byte sees all before it), ``carried, after N bytes`` (and N
            bytes before those), or ``windows of N`` (each byte sees BOS and what its own window of
            N bytes holds before it).
        state_bytes: all that is carried on after the last byte, 0 with windows.
    """

    bits_per_byte: float
    bytes: int
    context: str
    state_bytes: int = 0


def measure_bits_per_byte(
    model: PreTrainedModel,
    stream: ByteStream,
    *,
    limit_bytes: int | None = None,
    prime: ByteStream | None = None,
    chunk_tokens: int = 2048,
    device: torch.device | str | None = None,
    on_progress: Progress | None = None,
) -> BitsPerByte:
    """Predict every byte of a stream from BOS and the bytes before it.

    A model without a position table reads the stream once, its cache carried from chunk to chunk. A
    model with a table of N positions reads independent windows: BOS and N - 1 bytes predict N.

    Args:
        model: a byte-level causal language model; its mode (dropout) is restored afterwards.
        stream: what to predict, or as much of it as ``limit_bytes`` says.
        limit_bytes: bytes to predict, from the start; ``None`` is all.
        prime: read first, and not counted: the stream goes on where it ends. The last
            ``PRIME_TOKENS`` bytes by all of the model, those before by its suffix automaton, if it
            has one and no associative memory beside it.
        chunk_tokens: tokens in one forward pass; moves the result by rounding only.
        device: move the model there first; ``None`` leaves it where it is.
        on_progress: called with the bytes done, after every forward pass.

    Raises:
        InputError: if the stream is empty, a limit is below 1, or something is to be read before
            the stream by a model with a position table.

    Cost:
        Peak bytes are constant in the stream's length for models whose cache is.
    """
    num_bytes = _count_bytes(stream, limit_bytes, chunk_tokens)
    model.to(model.device if device is None else device)
    window = model.config.max_position_embeddings
    if prime is not None and window is not None:
        raise InputError(
            f"the model reads windows of {window} tokens and nothing before them; leave out prime"
        )
    nats, num_done = 0.0, 0
    cache: UniMatrixCache | None = None
    chunks = _cut(stream, num_bytes, chunk_tokens, window)
    with suspend_training(model):
        if window is None:
            scores: Iterable[_Score] = _score_carried(model, prime, chunks, chunk_tokens)
        else:
            scores = _score_windows(model, chunks)
        for part_nats, part_bytes, carried in scores:
            nats, num_done, cache = nats + part_nats, num_done + part_bytes, carried
            if on_progress is not None:
                on_progress(num_done)
    return BitsPerByte(
        to_bits_per_byte(nats, num_bytes),
        num_bytes,
        _name_context(window, prime),
        0 if cache is None else cache.num_bytes(),
    )


def _name_context(window: int | None, prime: ByteStream | None) -> str:
    if window is not None:
        return f"windows of {window}"
    return "carried" if prime is None else f"carried, after {len(prime):,} bytes"


def _count_bytes(stream: ByteStream, limit_bytes: int | None, chunk_tokens: int) -> int:
    """Return how many bytes to predict, or raise ``InputError`` for what cannot be measured."""
    for name, value in (("limit_bytes", limit_bytes), ("chunk_tokens", chunk_tokens)):
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}; it must be at least 1")
    if len(stream) == 0:
        raise InputError(f"{stream.name} has no bytes to predict; give text with --data")
    return len(stream) if limit_bytes is None else min(limit_bytes, len(stream))


def _cut(
    stream: ByteStream, num_bytes: int, chunk_tokens: int, window: int | None
) -> Iterator[NDArray[np.int64]]:
    """Yield the ids of what one forward pass predicts, [B, T]: one row, or whole windows."""
    row = chunk_tokens if window is None else window
    num_rows = max(1, chunk_tokens // row)
    for start in range(0, num_bytes, row * num_rows):
        ids = encode_bytes(stream.read(start, min(start + row * num_rows, num_bytes)).data)
        num_whole = len(ids) // row * row
        if num_whole:
            yield ids[:num_whole].reshape(-1, row)
        if num_whole < len(ids):
            yield ids[num_whole:].reshape(1, -1)


def _score_carried(
    model: PreTrainedModel,
    prime: ByteStream | None,
    chunks: Iterable[NDArray[np.int64]],
    chunk_tokens: int,
) -> Iterator[_Score]:
    """Yield nats, bytes and the cache of chunks [1, T] of one stream, no bytes for the first."""
    # An automaton without a bound would be copied at every call.
    options = {"gives_up_cache": True} if isinstance(model, UniMatrixForCausalLM) else {}
    cache, last_id = None, BOS_ID
    first: Iterable[NDArray[np.int64]] = ()
    if prime is not None:
        num_skipped = max(0, len(prime) - PRIME_TOKENS) if _only_automaton_lasts(model) else 0
        if num_skipped:
            cache, last_id = _remember(model, prime, num_skipped)
        rest = prime.slice(num_skipped, len(prime), name=prime.name)
        first = _cut(rest, len(rest), chunk_tokens, None)
    for counts, parts in ((False, first), (True, chunks)):
        for targets in parts:
            output = _predict(
                model,
                targets,
                [[last_id]],
                past_key_values=cache,
                use_cache=True,
                **options,
            )
            cache, last_id = output.past_key_values, int(targets[0, -1])
            nats = _sum_nats(output.logits, targets) if counts else 0.0
            yield nats, targets.size * counts, cache


def _only_automaton_lasts(model: PreTrainedModel) -> bool:
    """Return whether nothing but a suffix automaton remembers what is far back."""
    if not isinstance(model, UniMatrixForCausalLM):
        return False
    config = model.config
    parts = (config.residual_path, config.associative_memory)
    return parts == ("suffix_automaton", "none")


def _remember(
    model: PreTrainedModel, stream: ByteStream, num_bytes: int
) -> tuple[UniMatrixCache, int]:
    """Let the automaton read BOS and the first bytes but one; return the cache, and that one."""
    config = model.config
    automaton = read_with_automaton(stream, num_bytes, config.automaton_window)
    last_ids = torch.from_numpy(stream.read_tokens(num_bytes - 1, num_bytes + 1))
    cache = replace(
        start_cache(config, last_ids[None].to(model.device)),
        num_columns=num_bytes,
        num_tokens=torch.tensor([num_bytes], device=model.device),
        last_token_ids=last_ids[:1].to(model.device),
        automaton=automaton,
    )
    return cache, int(last_ids[1])


def _score_windows(model: PreTrainedModel, chunks: Iterator[NDArray[np.int64]]) -> Iterator[_Score]:
    """Yield nats and bytes of batches of independent windows [B, T]."""
    for targets in chunks:
        output = _predict(model, targets, [[BOS_ID]] * len(targets), use_cache=False)
        yield _sum_nats(output.logits, targets), targets.size, None


def _predict(
    model: PreTrainedModel, targets: NDArray[np.int64], first: list[list[int]], **options: Any
) -> Any:
    """Run the model on the targets moved one to the right, ``first`` [B, 1] in front."""
    input_ids = np.concatenate([np.asarray(first, np.int64), targets[:, :-1]], axis=1)  # [B, T]
    return model(input_ids=torch.from_numpy(input_ids).to(model.device), **options)


def _sum_nats(logits: Tensor, targets: NDArray[np.int64]) -> float:
    """Return the summed cross entropy of logits [B, T, V] with targets [B, T]."""
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    labels = torch.from_numpy(targets).to(logits.device).flatten()
    return float(cross_entropy(logits.flatten(0, 1), labels, reduction="sum"))
