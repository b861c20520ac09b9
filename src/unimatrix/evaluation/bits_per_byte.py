"""Bits per byte: what it costs to send a stream with a model's predictions."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from unimatrix.cache import UniMatrixCache
from unimatrix.data import ByteStream
from unimatrix.errors import InputError
from unimatrix.evaluation.units import to_bits_per_byte
from unimatrix.inference.streams import (
    carry_state,
    name_context,
    read_first,
    require_state,
)
from unimatrix.inference.suspend_training import suspend_training
from unimatrix.tokenization import BOS_ID, encode_bytes

Progress = Callable[[int], None]

_Score = tuple[float, int, UniMatrixCache | None]


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
        prime: read first (``read_first``) and not counted: the stream goes on where it ends.
        chunk_tokens: tokens in one forward pass over the stream; moves the result by rounding only.
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
    if prime is not None:
        require_state(model)
    nats, num_done = 0.0, 0
    cache: UniMatrixCache | None = None
    chunks = _cut(stream, num_bytes, chunk_tokens, window)
    with suspend_training(model):
        if window is None:
            scores: Iterable[_Score] = _score_carried(model, prime, chunks)
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
    return name_context(prime)


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
) -> Iterator[_Score]:
    """Yield nats, bytes and the cache of chunks [1, T] of one stream."""
    cache, last_id = (None, BOS_ID) if prime is None else read_first(model, prime)
    for targets in chunks:
        logits, cache = carry_state(model, _shift(model, targets, last_id), cache)
        last_id = int(targets[0, -1])
        yield _sum_nats(logits, targets), targets.size, cache


def _score_windows(model: PreTrainedModel, chunks: Iterator[NDArray[np.int64]]) -> Iterator[_Score]:
    """Yield nats and bytes of batches of independent windows [B, T]."""
    for targets in chunks:
        output = model(input_ids=_shift(model, targets, BOS_ID), use_cache=False)
        yield _sum_nats(output.logits, targets), targets.size, None


def _shift(model: PreTrainedModel, targets: NDArray[np.int64], first_id: int) -> Tensor:
    """Return the targets [B, T] moved one to the right on the model's device, an id in front."""
    first = np.full((len(targets), 1), first_id, np.int64)
    return torch.from_numpy(np.concatenate([first, targets[:, :-1]], axis=1)).to(model.device)


def _sum_nats(logits: Tensor, targets: NDArray[np.int64]) -> float:
    """Return the summed cross entropy of logits [B, T, V] with targets [B, T]."""
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    labels = torch.from_numpy(targets).to(logits.device).flatten()
    return float(cross_entropy(logits.flatten(0, 1), labels, reduction="sum"))
