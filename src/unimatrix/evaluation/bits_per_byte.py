"""Bits per byte: what it costs to send a stream with a model's predictions."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from unimatrix.cache import UniMatrixCache
from unimatrix.data import ByteStream, ConsecutiveWindows
from unimatrix.errors import InputError
from unimatrix.evaluation.units import to_bits_per_byte
from unimatrix.inference.streams import (
    carry_state,
    count_bytes,
    name_context,
    read_first,
    require_state,
    shift_right,
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
        context: what a byte is predicted from: ``carried`` (all bytes before it), ``carried, after
            N bytes`` (those, and N bytes read first), ``windows of N`` (BOS and the bytes before it
            in its window of N), or ``consecutive windows of N``.
        state_bytes: the size of the state after the last byte, 0 with windows.
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
        prime: a text that is read first (``read_first``), not counted, and continued by the stream.
        chunk_tokens: tokens in one forward pass over the stream; moves the result by rounding only.
        device: move the model there first; ``None`` leaves it where it is.
        on_progress: called with the bytes done, after every forward pass.

    Raises:
        InputError: if the stream is empty, a number is below 1, or ``prime`` is given to a model
            with a position table.

    Cost:
        Peak bytes are constant in the stream's length for models whose cache is.
    """
    num_bytes = count_bytes(stream, limit_bytes)
    if chunk_tokens < 1:
        raise InputError(f"chunk_tokens is {chunk_tokens}; it must be at least 1")
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
        name_context(prime) if window is None else f"windows of {window}",
        0 if cache is None else cache.num_bytes(),
    )


def measure_consecutive_windows(
    model: PreTrainedModel, windows: ConsecutiveWindows, *, batch_size: int = 16
) -> BitsPerByte:
    """Predict the T labels of each window from its T tokens alone.

    Source: paper, validation of the byte-level WikiText-2 recipe: the mean loss over consecutive
    windows of the training length.

    Args:
        model: a byte-level causal language model, on the device it is to run on.
        windows: what to predict; the first window starts with BOS, the others with a byte.
        batch_size: windows of one forward pass; moves the result by rounding only.
    """
    nats, num_labels = 0.0, 0
    with suspend_training(model):
        for batch in DataLoader(windows, batch_size=batch_size):
            placed = {name: tensor.to(model.device) for name, tensor in batch.items()}
            # Models of transformers compute no loss without labels.
            loss = model(**placed, labels=placed["shift_labels"], use_cache=False).loss
            assert isinstance(loss, torch.Tensor)
            nats += loss.item() * batch["shift_labels"].numel()
            num_labels += batch["shift_labels"].numel()
    context = f"consecutive windows of {windows.window_tokens}"
    return BitsPerByte(to_bits_per_byte(nats, num_labels), num_labels, context)


def _cut(
    stream: ByteStream, num_bytes: int, chunk_tokens: int, window: int | None
) -> Iterator[NDArray[np.int64]]:
    """Yield the ids that each forward pass predicts, [B, T]: one row, or whole windows."""
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
    model: PreTrainedModel, prime: ByteStream | None, chunks: Iterable[NDArray[np.int64]]
) -> Iterator[_Score]:
    """Yield nats, bytes and the cache of chunks [1, T] of one stream."""
    cache, last_id = (None, BOS_ID) if prime is None else read_first(model, prime)
    for targets in chunks:
        logits, cache = carry_state(model, shift_right(model, targets, last_id), cache)
        last_id = int(targets[0, -1])
        yield _sum_nats(logits, targets), targets.size, cache


def _score_windows(model: PreTrainedModel, chunks: Iterator[NDArray[np.int64]]) -> Iterator[_Score]:
    """Yield nats and bytes of batches of independent windows [B, T]."""
    for targets in chunks:
        output = model(input_ids=shift_right(model, targets, BOS_ID), use_cache=False)
        yield _sum_nats(output.logits, targets), targets.size, None


def _sum_nats(logits: Tensor, targets: NDArray[np.int64]) -> float:
    """Return the summed cross entropy of logits [B, T, V] with targets [B, T]."""
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    labels = torch.from_numpy(targets).to(logits.device).flatten()
    return float(cross_entropy(logits.flatten(0, 1), labels, reduction="sum"))
