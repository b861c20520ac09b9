"""The bytes that any causal model carries after it has read so many tokens."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from unimatrix.baselines.universal_transformer import RepeatedLayer
from unimatrix.cache import UniMatrixCache
from unimatrix.data import ByteStream
from unimatrix.inference.streams import (
    CHUNK_TOKENS,
    carry_state,
    name_state,
    read_first,
    require_state,
)
from unimatrix.inference.suspend_training import suspend_training
from unimatrix.tokenization import BOS_ID, encode_bytes

_FEW_TOKENS = 4
# Nothing that these carry depends on how much they have read.
_CONSTANT_TYPES = ("linear_attention_peer", "mamba2", "rwkv")


def measure_carried_bytes(
    model: PreTrainedModel, stream: ByteStream, num_tokens: int, prime: ByteStream | None = None
) -> int:
    """Return the bytes of everything carried to the next token, at batch 1.

    A model with state reads the stream (again from its start where it is short), because what a
    suffix automaton holds depends on the text; every tensor counts, as allocated. A Transformer
    carries the keys and values of all tokens that it may look at again: of all ``num_tokens``, or
    as many as its position table has rows.

    Args:
        model: any that ``measure_byte_costs`` reads, on the device it is to run on; ours has no
            position table.
        stream: text of at least one byte.
        num_tokens: tokens read, BOS included.
        prime: read before those, as in ``measure_byte_costs``.
    """
    if prime is not None:
        require_state(model)
    with suspend_training(model):
        if name_state(model) is None:
            return _count_keys_and_values(model, num_tokens)
        num_read = _FEW_TOKENS if model.config.model_type in _CONSTANT_TYPES else num_tokens
        text = encode_bytes(stream.read(0, min(len(stream), num_read)).data)
        state, last_id = (None, BOS_ID) if prime is None else read_first(model, prime)
        for start in range(0, num_read, CHUNK_TOKENS):
            places = torch.arange(start, min(start + CHUNK_TOKENS, num_read))
            ids = torch.from_numpy(text)[(places - 1) % len(text)]
            ids[places == 0] = last_id
            _, state = carry_state(model, ids[None].to(model.device), state)
    if isinstance(state, UniMatrixCache):
        return state.num_bytes()
    return sum(tensor.numel() * tensor.element_size() for tensor in _list_tensors(state))


def _count_keys_and_values(model: PreTrainedModel, num_tokens: int) -> int:
    """Return the bytes of keys and values of so many tokens, over all layers."""
    config = model.config
    assert config.model_type in ("llama", "gpt2"), config.model_type
    if config.model_type == "gpt2":
        num_tokens = min(num_tokens, config.max_position_embeddings)
    repeated = [m.num_times for m in model.modules() if isinstance(m, RepeatedLayer)]
    num_places = sum(repeated) if repeated else config.num_hidden_layers
    # Multi-head attention throughout: keys and values are as wide as the stream.
    element_size: int = next(model.parameters()).element_size()
    num_numbers = 2 * num_places * num_tokens * int(config.hidden_size)
    return num_numbers * element_size


def _list_tensors(state: object) -> Iterator[Tensor]:
    """Yield every tensor of a state: of nested lists, tables and cache objects."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, Mapping | list | tuple):
        for part in state.values() if isinstance(state, Mapping) else state:
            yield from _list_tensors(part)
    elif hasattr(state, "__dict__"):
        yield from _list_tensors(vars(state))
