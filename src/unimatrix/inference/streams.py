"""Reading a text in parts, with any causal model that carries a state from part to part."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from unimatrix.cache import UniMatrixCache, start_cache
from unimatrix.data import ByteStream
from unimatrix.errors import InputError
from unimatrix.inference.suffix_matches import read_with_automaton
from unimatrix.modeling import UniMatrixForCausalLM
from unimatrix.nn.residual_context import ResidualContext
from unimatrix.tokenization import BOS_ID

CHUNK_TOKENS = 2048
"""Tokens of one forward pass; moves a result by rounding only."""
PRIME_TOKENS = 65_536
"""A model whose only long memory is the suffix automaton reads this many bytes at the end of a text
that is read first. The automaton alone reads the bytes before, which matrix states would forget."""

# The name of a model's state, as an argument and in its output, by model type.
_STATE_NAMES = {
    "unimatrix": "past_key_values",
    "linear_attention_peer": "past_key_values",
    "mamba2": "cache_params",
    "rwkv": "state",
}


def name_state(model: PreTrainedModel) -> str | None:
    """Return the name of the state that a model carries; ``None`` for a model that reads windows.

    Args:
        model: ours, a linear attention, Mamba-2, RWKV, or a Transformer. Transformers read windows,
            and so do ours with a position table.
    """
    config = model.config
    if isinstance(model, UniMatrixForCausalLM) and config.max_position_embeddings is not None:
        return None
    return _STATE_NAMES.get(config.model_type)


def carry_state(model: PreTrainedModel, ids: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Read ids [B, T] on from a state; return the logits [B, T, V] and the state after them.

    ``state`` is ``None`` at the start, and may be altered. The model has state (``name_state``).
    """
    name = name_state(model)
    assert name is not None, model.config.model_type
    # An automaton without a bound would be copied at every call.
    options = {"gives_up_cache": True} if isinstance(model, UniMatrixForCausalLM) else {}
    output = model(input_ids=ids, use_cache=True, **{name: state}, **options)
    return output.logits, getattr(output, name)


def require_state(model: PreTrainedModel) -> None:
    """Raise ``InputError`` unless the model can read one text before another."""
    if name_state(model) is None:
        raise InputError(
            "the model reads windows and nothing before them; give it no text to read first"
        )


def read_first(model: PreTrainedModel, text: ByteStream) -> tuple[Any, int]:
    """Read a text before the one that is measured or written, which continues it.

    The whole model reads the last ``PRIME_TOKENS`` bytes. A suffix automaton without an associative
    memory beside it reads the bytes before them alone; other models read all bytes.

    Args:
        model: computes without gradients; its mode is the caller's (``suspend_training``).
        text: at least one byte.

    Returns:
        the state after all bytes but the last, and the last: the id to read next.

    Cost:
        Time linear in the text; an automaton without a bound grows with it.
    """
    require_state(model)
    state, start = None, 0
    if len(text) > PRIME_TOKENS and _only_automaton_lasts(model):
        start = len(text) - PRIME_TOKENS
        state = _remember(model, text, start)
    # Token 0 is BOS and token i is byte i - 1, so that the last byte is left to be read.
    for first in range(start, len(text), CHUNK_TOKENS):
        tokens = text.read_tokens(first, min(first + CHUNK_TOKENS, len(text)))
        _, state = carry_state(model, torch.from_numpy(tokens)[None].to(model.device), state)
    return state, int(text.read_tokens(len(text), len(text) + 1)[0])


def read_on(
    model: PreTrainedModel, ids: NDArray[np.int64], state: Any, *, first_id: int = BOS_ID
) -> Iterator[tuple[Tensor, NDArray[np.int64]]]:
    """Yield logits [1, T, V] and the ids [1, T] that they predict, chunk by chunk.

    Args:
        model: as in ``read_first``.
        ids: [n] int64, the tokens to predict.
        state: after the tokens before them; ``None`` at the start. It may be altered.
        first_id: the token before them, which the state has not read.
    """
    for start in range(0, len(ids), CHUNK_TOKENS):
        targets = ids[None, start : start + CHUNK_TOKENS]
        logits, state = carry_state(model, shift_right(model, targets, first_id), state)
        first_id = int(targets[0, -1])
        yield logits, targets


def count_bytes(stream: ByteStream, limit_bytes: int | None) -> int:
    """Return how many bytes of a stream to predict.

    Raises:
        InputError: if the stream is empty, or the limit below 1.
    """
    if limit_bytes is not None and limit_bytes < 1:
        raise InputError(f"limit_bytes is {limit_bytes}; it must be at least 1")
    if len(stream) == 0:
        raise InputError(f"{stream.name} has no bytes to predict; give text with --data")
    return len(stream) if limit_bytes is None else min(limit_bytes, len(stream))


def shift_right(model: PreTrainedModel, targets: NDArray[np.int64], first_id: int) -> Tensor:
    """Return the inputs [B, T] that predict ``targets`` [B, T], ``first_id`` leading each row."""
    first = np.full((len(targets), 1), first_id, np.int64)
    return torch.from_numpy(np.concatenate([first, targets[:, :-1]], axis=1)).to(model.device)


def name_context(prime: ByteStream | None) -> str:
    """Return, in words, what the bytes of a text are predicted from that continues ``prime``."""
    return "carried" if prime is None else f"carried, after {len(prime):,} bytes"


def _only_automaton_lasts(model: PreTrainedModel) -> bool:
    """Return whether nothing but a suffix automaton has a long memory."""
    if not isinstance(model, UniMatrixForCausalLM):
        return False
    parts = (model.config.residual_path, model.config.associative_memory)
    return parts == ("suffix_automaton", "none")


def _remember(model: PreTrainedModel, text: ByteStream, num_tokens: int) -> UniMatrixCache:
    """Let the automaton read the first tokens, BOS included; return the cache after them."""
    config = model.config
    automaton = read_with_automaton(text, num_tokens, config.automaton_window)
    last_ids = torch.from_numpy(text.read_tokens(num_tokens - 1, num_tokens))[None]
    return replace(
        start_cache(config, last_ids.to(model.device)),
        num_columns=num_tokens,
        num_tokens=torch.tensor([num_tokens], device=model.device),
        last_token_ids=last_ids[0].to(model.device),
        shared={ResidualContext.name: automaton},
        text_hash=None,
    )
