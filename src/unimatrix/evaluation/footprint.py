"""How large a model is: parameters by part, and the bytes it carries while it reads."""

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

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
from unimatrix.modeling import UniMatrixForCausalLM
from unimatrix.nn.mixer import Mixer
from unimatrix.tokenization import BOS_ID, encode_bytes

# Beginning of a parameter's name -> the part it belongs to.
_PARTS = (
    ("model.embed_tokens.", "token_embedding"),
    ("model.embed_positions.", "position_table"),
    ("model.embed_depth.", "depth_step_embedding"),
    ("model.residual_context.", "residual_context"),
    ("model.block.context_gate.", "residual_context"),
    ("model.token_modulation.", "token_modulation"),
    ("model.pointer_mixture.", "pointer_mixture"),
    ("model.block.feed_forward.", "feed_forward"),
    ("model.block.norm.", "norms"),
    ("model.block.ffn_norm.", "norms"),
    ("model.norm.", "norms"),
    ("lm_head.", "head"),
)


_FEW_TOKENS = 4
# The state of these has the same size after any number of tokens.
_CONSTANT_TYPES = ("linear_attention_peer", "mamba2", "rwkv")


def count_parameters(model: UniMatrixForCausalLM) -> dict[str, int]:
    """Return the parameters of each part that the model has; a tied head counts once."""
    parts = (*((f"model.block.{name}.", name) for name in Mixer.kinds), *_PARTS)
    counts = {part: 0 for _, part in parts}
    for name, parameter in model.named_parameters():
        part = next((part for start, part in parts if name.startswith(start)), None)
        assert part is not None, name
        counts[part] += parameter.numel()
    return {part: count for part, count in counts.items() if count}


def measure_state_bytes(model: UniMatrixForCausalLM, *, num_tokens: int = 1) -> dict[str, int]:
    """Return the bytes by part of the cache after some tokens, as allocated, at batch 1.

    Args:
        model: any preset; its mode is restored afterwards.
        num_tokens: tokens read before; only the parts of ``list_growing_parts`` depend on it.
    """
    first_id = model.config.bos_token_id or 0
    tokens = torch.full((1, num_tokens), first_id, dtype=torch.int64, device=model.device)
    with suspend_training(model):
        cache = model(input_ids=tokens, use_cache=True).past_key_values
    return {part: count for part, count in cache.bytes_by_part().items() if count}


def list_growing_parts(model: UniMatrixForCausalLM) -> list[str]:
    """Return the parts of the cache that grow with the stream; every other is constant."""
    return [mixer.part for mixer in model.model.mixers if mixer.grows]


def measure_carried_bytes(
    model: PreTrainedModel, stream: ByteStream, num_tokens: int, prime: ByteStream | None = None
) -> int:
    """Return the bytes of everything that any causal model carries to the next token, at batch 1.

    A model with state reads the stream, a short one over and over, because the size of a suffix
    automaton depends on the text; every tensor counts, as allocated. A Transformer carries keys and
    values of all ``num_tokens``, or of as many as its position table has rows.

    Args:
        model: any that ``measure_byte_costs`` reads, on the device it is to run on; ours has no
            position table.
        stream: text of at least one byte.
        num_tokens: tokens read, BOS included.
        prime: a text read before them, as in ``measure_byte_costs``.
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
    return state.num_bytes() if isinstance(state, UniMatrixCache) else count_cache_bytes(state)


def _count_keys_and_values(model: PreTrainedModel, num_tokens: int) -> int:
    """Return the bytes of the keys and values of ``num_tokens`` tokens, over all layers."""
    from unimatrix.baselines.transformers_models import RepeatedLayer  # Loads Llama.

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


def count_cache_bytes(carried: object) -> int:
    """Return the bytes of all tensors in a cache of any library, or nested ones, as allocated."""
    return sum(tensor.nbytes for tensor in _list_tensors(carried, set()))


def _list_tensors(value: object, visited: set[int]) -> Iterator[Tensor]:
    """Yield every tensor below ``value`` once; classes and modules hold none that are carried."""
    if id(value) in visited:
        return
    visited.add(id(value))
    if isinstance(value, Tensor):
        yield value
        return
    if hasattr(value, "__dict__") and not isinstance(value, type | torch.nn.Module):
        yield from _list_tensors(vars(value), visited)
    if isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _list_tensors(part, visited)
