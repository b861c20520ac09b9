"""Checks of a cache from a file, or put together by hand, before compiled code reads it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from unimatrix.configuration import UniMatrixConfig
from unimatrix.errors import InputError
from unimatrix.nn.mixer import Mixer, StateTensor
from unimatrix.ops.checks import require_dtype
from unimatrix.ops.suffix_automaton import keep_text
from unimatrix.ops.text_index import TextIndex, rebuild_index

_ADVICE = "pass a cache that this model has made, or that UniMatrixCache.save has written"


def require_sound(
    tensors: Mapping[str, Tensor],
    states: Sequence[tuple[str, Mapping[str, Any]]],
    config: UniMatrixConfig,
) -> None:
    """Raise ``InputError`` unless shapes, types and ids are those of the model.

    Args:
        tensors: every tensor of the cache by its name.
        states: of each depth step and then those shared, by the mixer's name; each with the prefix
            of its tensors' names.
        config: of the model.
    """
    num_depth_steps = len(states) - 1
    if num_depth_steps != config.num_hidden_layers:
        raise InputError(
            f"this cache holds {num_depth_steps} depth steps and the model has "
            f"{config.num_hidden_layers}; {_ADVICE}"
        )
    batch = tensors["num_tokens"].shape[0]
    expected = {
        "num_tokens": StateTensor((), "int64"),
        "last_token_ids": StateTensor((), "int64", is_ids=True),
    }
    for prefix, by_mixer in states:
        for name in by_mixer:
            kind = Mixer.kinds[name]
            for ending, form in kind.list_state_tensors(config).items():
                expected[f"{prefix}{kind.state_prefix}{ending}"] = form
    for name, form in expected.items():
        if name in tensors:
            _require_form(name, tensors[name], batch, form, config.vocab_size)
    _require_range("num_tokens", tensors["num_tokens"], 0, 2**62)


def _require_form(
    name: str, tensor: Tensor, batch: int, form: StateTensor, vocab_size: int
) -> None:
    """Raise ``InputError`` unless a tensor is what compiled code takes it for."""
    shape = [batch, *form.sizes]
    if list(tensor.shape) != shape:
        raise InputError(f"{name} has shape {list(tensor.shape)}; pass {shape}")
    if form.holds == "floats":
        require_dtype(name, tensor, None)
    elif form.holds == "int64":
        require_dtype(name, tensor, torch.int64)
    elif tensor.is_floating_point():
        raise InputError(f"{name} has dtype {tensor.dtype}; {_ADVICE}")
    if form.is_ids:
        _require_range(name, tensor, -1, vocab_size - 1)


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
