"""What each byte of a stream costs under any causal model, by one rule for all of them.

A model with state reads the stream once and carries its state from the first byte to the last. A
Transformer, which has none, reads windows of W tokens, the length that it was trained on. Each
window starts with BOS and overlaps the window before by half; only bytes with at least half a
window before them count (in the first window, all bytes). So a byte of a Transformer sees between
W / 2 and W - 1 bytes, at twice the arithmetic.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from unimatrix.data import ByteStream
from unimatrix.errors import InputError
from unimatrix.evaluation.units import to_bits_per_byte
from unimatrix.inference.streams import (
    CHUNK_TOKENS,
    count_bytes,
    name_context,
    name_state,
    read_first,
    read_on,
    require_state,
    shift_right,
)
from unimatrix.inference.suspend_training import suspend_training
from unimatrix.tokenization import BOS_ID, encode_bytes

Score = Callable[[Tensor, NDArray[np.int64]], NDArray[np.float32]]


class ByteCosts(NamedTuple):
    """What each byte costs.

    Attributes:
        nats: [n] float32, in the order of the stream.
        context: as in ``BitsPerByte``, or ``windows of N, half overlapping``.
    """

    nats: NDArray[np.float32]
    context: str

    @property
    def bits_per_byte(self) -> float:
        """Mean over all bytes."""
        return to_bits_per_byte(float(self.nats.sum(dtype=np.float64)), len(self.nats))


def cost_targets(logits: Tensor, targets: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return the cross entropy [B, T] of logits [B, T, V] with targets [B, T], in nats."""
    labels = torch.from_numpy(np.ascontiguousarray(targets)).to(logits.device)
    nats = cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none")
    costs: NDArray[np.float32] = nats.view(targets.shape).cpu().numpy()
    return costs


def hit_targets(logits: Tensor, targets: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return 1 where the target [B, T] has the largest of the logits [B, T, V], else 0."""
    hits: NDArray[np.float32] = (logits.argmax(-1).cpu().numpy() == targets).astype(np.float32)
    return hits


def measure_byte_costs(
    model: PreTrainedModel,
    stream: ByteStream,
    *,
    window_tokens: int,
    limit_bytes: int | None = None,
    prime: ByteStream | None = None,
) -> ByteCosts:
    """Predict every byte of a stream by the rule above.

    Args:
        model: a byte-level causal language model, on the device it is to run on.
        stream: what to predict, or as much of it as ``limit_bytes`` says.
        window_tokens: W, the length trained on; even. Models with state ignore it.
        limit_bytes: bytes to predict, from the start; ``None`` is all.
        prime: a text that is read first (``read_first``), not counted, and continued by the stream.

    Raises:
        InputError: if the stream is empty, a limit is below 1, W is odd, or ``prime`` is given to a
            model without state.
    """
    num_bytes = count_bytes(stream, limit_bytes)
    if window_tokens < 2 or window_tokens % 2:
        raise InputError(f"window_tokens is {window_tokens}; it must be even, for half overlaps")
    data = encode_bytes(stream.read(0, num_bytes).data)
    nats, context = score_tokens(
        model, data, first_id=BOS_ID, window_tokens=window_tokens, prime=prime
    )
    return ByteCosts(nats, context)


def score_tokens(
    model: PreTrainedModel,
    ids: NDArray[np.int64],
    *,
    first_id: int,
    window_tokens: int,
    score: Score = cost_targets,
    prime: ByteStream | None = None,
) -> tuple[NDArray[np.float32], str]:
    """Score every token of a stream by the rule above.

    Args:
        model: a causal language model, on the device it is to run on.
        ids: [n] int64, at least one, without BOS.
        first_id: what stands in front of the stream and of every window: BOS.
        window_tokens: W, even. Models with state ignore it.
        score: turns logits [B, T, V] and targets [B, T] into one number a target.
        prime: as in ``measure_byte_costs``; its last byte then stands for ``first_id``.

    Returns:
        [n] float32, and the context as in ``ByteCosts``.
    """
    if prime is not None:
        require_state(model)
    with suspend_training(model):
        if name_state(model) is None:
            parts = list(_read_windows(model, ids, first_id, window_tokens, score))
            context = f"windows of {window_tokens}, half overlapping"
        else:
            state, last_id = (None, first_id) if prime is None else read_first(model, prime)
            chunks = read_on(model, ids, state, first_id=last_id)
            parts = [score(logits, targets)[0] for logits, targets in chunks]
            context = name_context(prime)
    scores = np.concatenate(parts)
    assert len(scores) == len(ids), (len(scores), len(ids))
    return scores, context


def _read_windows(
    model: PreTrainedModel, data: NDArray[np.int64], first_id: int, window_tokens: int, score: Score
) -> Iterator[NDArray[np.float32]]:
    """Yield the scores of the tokens that each window adds; whole windows several at a time."""
    half = window_tokens // 2

    def predict(targets: NDArray[np.int64]) -> NDArray[np.float32]:
        ids = shift_right(model, targets, first_id)
        return score(model(input_ids=ids, use_cache=False).logits, targets)

    yield predict(data[None, :window_tokens])[0]
    starts = np.arange(half, len(data) - half, half)
    whole = starts[starts + window_tokens <= len(data)]
    num_rows = max(1, CHUNK_TOKENS // window_tokens)
    for index in range(0, len(whole), num_rows):
        rows = whole[index : index + num_rows, None] + np.arange(window_tokens)
        yield predict(data[rows])[:, half:].reshape(-1)
    if len(starts) > len(whole):
        yield predict(data[None, starts[len(whole)] :])[0, half:]
