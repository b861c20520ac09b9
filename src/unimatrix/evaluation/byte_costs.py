"""What each byte of a stream costs under any causal model, by one rule for all of them.

A model with state reads the stream once, its state carried from the first byte to the last. A model
without (a Transformer) reads windows of the length that it was trained on: each starts with BOS and
overlaps the one before by half, and only bytes with at least half a window before them count (the
first window counts in full). So a byte of a Transformer sees between W / 2 and W - 1 bytes, at
twice the arithmetic; reading on past W would leave what it was trained for.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from unimatrix.data import ByteStream
from unimatrix.errors import InputError
from unimatrix.evaluation.modes import suspend_training
from unimatrix.evaluation.units import to_bits_per_byte
from unimatrix.modeling import UniMatrixForCausalLM
from unimatrix.tokenization import BOS_ID, encode_bytes

CHUNK_TOKENS = 2048
"""Tokens of one forward pass; moves the result by rounding only."""

Score = Callable[[Tensor, NDArray[np.int64]], NDArray[np.float32]]

# What a model calls its state, as an argument and in its output.
_STATE_NAMES = {
    "unimatrix": "past_key_values",
    "linear_attention_peer": "past_key_values",
    "mamba2": "cache_params",
    "rwkv": "state",
}


class ByteCosts(NamedTuple):
    """What each byte costs.

    Attributes:
        nats: [n] float32, in the order of the stream.
        context: what each byte sees: ``carried`` or ``windows of N, half overlapping``.
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


def name_state(model: PreTrainedModel) -> str | None:
    """Return what a model calls the state it can carry on; ``None`` for a model of windows.

    Args:
        model: ours, a linear attention, Mamba-2, RWKV, or a Transformer; ours with a position table
            reads windows too.
    """
    config = model.config
    if isinstance(model, UniMatrixForCausalLM) and config.max_position_embeddings is not None:
        return None
    return _STATE_NAMES.get(config.model_type)


def measure_byte_costs(
    model: PreTrainedModel,
    stream: ByteStream,
    *,
    window_tokens: int,
    limit_bytes: int | None = None,
) -> ByteCosts:
    """Predict every byte of a stream by the rule above.

    Args:
        model: a byte-level causal language model, on the device it is to run on.
        stream: what to predict, or as much of it as ``limit_bytes`` says.
        window_tokens: W, the length trained on; even. Models with state ignore it.
        limit_bytes: bytes to predict, from the start; ``None`` is all.

    Raises:
        InputError: if the stream is empty, a limit is below 1 or W is odd.
    """
    if limit_bytes is not None and limit_bytes < 1:
        raise InputError(f"limit_bytes is {limit_bytes}; it must be at least 1")
    if window_tokens < 2 or window_tokens % 2:
        raise InputError(f"window_tokens is {window_tokens}; it must be even, for half overlaps")
    num_bytes = len(stream) if limit_bytes is None else min(limit_bytes, len(stream))
    if num_bytes == 0:
        raise InputError(f"{stream.name} has no bytes to predict; give text with --data")
    data = encode_bytes(stream.read(0, num_bytes).data)
    nats, context = score_tokens(model, data, first_id=BOS_ID, window_tokens=window_tokens)
    return ByteCosts(nats, context)


def score_tokens(
    model: PreTrainedModel,
    ids: NDArray[np.int64],
    *,
    first_id: int,
    window_tokens: int,
    score: Score = cost_targets,
) -> tuple[NDArray[np.float32], str]:
    """Score every token of a stream by the rule above.

    Args:
        model: a causal language model, on the device it is to run on.
        ids: [n] int64, at least one, without BOS.
        first_id: what stands in front of the stream and of every window: BOS.
        window_tokens: W, even. Models with state ignore it.
        score: turns logits [B, T, V] and targets [B, T] into a number each.

    Returns:
        [n] float32, and the context as in ``ByteCosts``.
    """
    state_name = name_state(model)
    with suspend_training(model):
        if state_name is None:
            parts = list(_read_windows(model, ids, first_id, window_tokens, score))
            context = f"windows of {window_tokens}, half overlapping"
        else:
            parts = list(_read_on(model, ids, first_id, score))
            context = "carried"
    scores = np.concatenate(parts)
    assert len(scores) == len(ids), (len(scores), len(ids))
    return scores, context


def carry_state(model: PreTrainedModel, ids: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Read ids [B, T] on from a state; return the logits [B, T, V] and the state after them.

    Args:
        model: one with state.
        ids: what comes next.
        state: from the call before; ``None`` at the start. It may be altered.
    """
    name = name_state(model)
    assert name is not None, model.config.model_type
    # An automaton without a bound would be copied at every call.
    options = {"gives_up_cache": True} if isinstance(model, UniMatrixForCausalLM) else {}
    output = model(input_ids=ids, use_cache=True, **{name: state}, **options)
    return output.logits, getattr(output, name)


def _read_on(
    model: PreTrainedModel, data: NDArray[np.int64], first_id: int, score: Score
) -> Iterator[NDArray[np.float32]]:
    """Yield the scores of consecutive chunks of one stream."""
    inputs = np.concatenate([[first_id], data[:-1]])
    state: Any = None
    for start in range(0, len(data), CHUNK_TOKENS):
        ids = torch.from_numpy(inputs[None, start : start + CHUNK_TOKENS]).to(model.device)
        logits, state = carry_state(model, ids, state)
        yield score(logits, data[None, start : start + CHUNK_TOKENS])[0]


def _read_windows(
    model: PreTrainedModel,
    data: NDArray[np.int64],
    first_id: int,
    window_tokens: int,
    score: Score,
) -> Iterator[NDArray[np.float32]]:
    """Yield the scores of the tokens that each window adds; whole windows several at a time."""
    half = window_tokens // 2

    def predict(targets: NDArray[np.int64]) -> NDArray[np.float32]:
        starts = np.full((len(targets), 1), first_id, np.int64)
        ids = torch.from_numpy(np.concatenate([starts, targets[:, :-1]], axis=1))
        return score(model(input_ids=ids.to(model.device), use_cache=False).logits, targets)

    yield predict(data[None, :window_tokens])[0]
    starts = np.arange(half, len(data) - half, half)
    whole = starts[starts + window_tokens <= len(data)]
    num_rows = max(1, CHUNK_TOKENS // window_tokens)
    for index in range(0, len(whole), num_rows):
        rows = whole[index : index + num_rows, None] + np.arange(window_tokens)
        yield predict(data[rows])[:, half:].reshape(-1)
    if len(starts) > len(whole):
        yield predict(data[None, starts[len(whole)] :])[0, half:]
