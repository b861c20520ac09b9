"""Checks of a cache from a file, or put together by hand, before compiled code reads it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from unimatrix.configuration import UniMatrixConfig
from unimatrix.errors import InputError
from unimatrix.ops.checks import require_dtype, require_shape
from unimatrix.ops.suffix_automaton import keep_text
from unimatrix.ops.text_index import TextIndex, rebuild_index

# The end of a tensor's name -> its shape. Other tensors are read by torch alone.
_SHAPES = {
    "num_tokens": "B",
    "last_token_ids": "B",
    "matrix_state": "B H N N",
    "recent": "B K D",
    "previous": "B D",
    "selective.slots.slot_keys": "B M",
    "selective.slots.slot_value_ids": "B M",
    "selective.slots.slot_codes": "B M",
    "selective.recent_token_ids": "B R",
    "selective.logits": "B M",
    "slots.slot_keys": "B M C",
    "slots.slot_values": "B M D",
    "slots.slot_strength": "B M",
    "slots.slot_age": "B M",
    "slots.slot_token_ids": "B M",
}
_INT64 = ("num_tokens", "last_token_ids", "slots.slot_age", "slots.slot_token_ids")
_ADVICE = "pass a cache that this model has made, or that UniMatrixCache.save has written"


def require_sound(
    tensors: Mapping[str, Tensor], num_depth_steps: int, config: UniMatrixConfig
) -> None:
    """Raise ``InputError`` unless shapes, types and ids are those of the model."""
    if num_depth_steps != config.num_hidden_layers:
        raise InputError(
            f"this cache holds {num_depth_steps} depth steps and the model has "
            f"{config.num_hidden_layers}; {_ADVICE}"
        )
    farthest = max((max(pattern) for pattern in config.slot_key_patterns), default=0)
    sizes = {
        "B": tensors["num_tokens"].shape[0],
        "H": config.num_attention_heads,
        "N": config.head_dim,
        "K": max(config.conv_kernel - 1, 0),
        "D": config.hidden_size,
        "M": config.num_slots,
        "C": config.slot_key_size,
        "R": farthest + max(1, *config.slot_read_offsets, 1),
    }
    for name, tensor in tensors.items():
        ending = next((end for end in _SHAPES if f".{name}".endswith(f".{end}")), None)
        if ending is None:
            continue
        require_shape(name, tensor, _SHAPES[ending], sizes)
        is_whole = ending in _INT64 or "selective.slots" in ending or ending.endswith("_ids")
        if not is_whole:
            require_dtype(name, tensor, None)
        elif ending in _INT64:
            require_dtype(name, tensor, torch.int64)
        elif tensor.is_floating_point():
            raise InputError(f"{name} has dtype {tensor.dtype}; {_ADVICE}")
        if ending.endswith("_ids"):
            _require_range(name, tensor, -1, config.vocab_size - 1)
        elif ending == "num_tokens":
            _require_range(name, tensor, 0, 2**62)


def read_anew(
    shared: Mapping[str, Any], num_tokens: Tensor, config: UniMatrixConfig
) -> dict[str, Any]:
    """Return the shared states with every index of a text built again from the text.

    An index consists of positions in the text, and checking them all takes as long as building it.

    Args:
        shared: by the mixer's name.
        num_tokens: [B], tokens of each stream.
        config: of the model.

    Raises:
        InputError: if a text is not one of the model's tokens, or does not fit its window.
    """
    anew = dict(shared)
    window, vocab_size = config.automaton_window, config.vocab_size
    if automaton := shared.get("residual_context"):
        if isinstance(automaton, TextIndex) is (window is None):
            raise InputError(
                "this cache holds another kind of automaton, as earlier releases had with a "
                "window; read the text again"
            )
        if window is None:
            anew["residual_context"] = keep_text(automaton)
            _require_range("automaton.tokens", anew["residual_context"].tokens, 0, vocab_size - 1)
        else:
            anew["residual_context"] = rebuild_index(
                automaton, num_tokens, window, vocab_size, "none"
            )
    if index := shared.get("indexed_attention"):
        assert window is not None
        units = config.index_units
        anew["indexed_attention"] = rebuild_index(index, num_tokens, window, vocab_size, units)
    return anew


def _require_range(name: str, tensor: Tensor, lowest: int, highest: int) -> None:
    """Raise ``InputError`` unless all whole numbers lie in a range."""
    if tensor.numel() == 0:
        return
    smallest, largest = (int(bound) for bound in tensor.aminmax())
    if smallest < lowest or largest > highest:
        strange = smallest if smallest < lowest else largest
        raise InputError(f"{name} of this cache holds {strange}; {_ADVICE}")
