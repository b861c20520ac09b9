"""What the rows carry, in the arrays of the compiled step, and the way there and back."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unimatrix.cache import UniMatrixCache, digest_config
from unimatrix.configuration import UniMatrixConfig
from unimatrix.hub.weights_origin import WeightsOrigin
from unimatrix.kernels.step.layout import KEY_BLOCK
from unimatrix.nn.block import States
from unimatrix.nn.indexed_attention import IndexedAttention
from unimatrix.nn.matrix_mixer import MatrixMixer, MatrixState
from unimatrix.nn.residual_context import ResidualContext
from unimatrix.nn.selective_mixer import SelectiveMixer, SelectiveState
from unimatrix.nn.slot_mixer import SlotMixer, SlotMixerState
from unimatrix.ops.selective_slots import SelectiveSlots, empty_selective_slots
from unimatrix.ops.slots import SlotState, empty_slots
from unimatrix.ops.slots.native_step import prepare_slots
from unimatrix.ops.suffix_automaton import copy_automaton, empty_automaton
from unimatrix.ops.suffix_automaton.native_step import AutomatonStream
from unimatrix.ops.text_index import NUM_RECENT, TextIndex, copy_index, empty_index
from unimatrix.ops.text_index.native_step import IndexStream

Array = np.ndarray[Any, Any]


@dataclass(eq=False)
class StepState:
    """The state of B rows, changed in place by the compiled step.

    Attributes:
        num_columns: columns consumed so far, padding included.
        matrix_states: [L, B, H, N, N], address by payload; no depth steps without matrix state.
        recents: [L, B, K - 1, D], normalised streams of the last tokens; ``None`` without a short
            convolution.
        slots: keys [G, B, M, C], values [G, B, M, D], strengths [G, B, M], previous [G, B, D] and,
            in float64, units [G, B, M, C] and offsets [G, B, M] of the keys; ages and token ids
            [G, B, M] int64. G is 1 with the token source, L with the hidden one. ``None`` without.
        selective: keys, values and codes [B, M], recent token ids [B, n], all int64; or ``None``.
        counters: [B, 3] int64, tokens so far, the last token and the hash of the text.
        knows_text: whether that hash is of the whole text.
        automaton: what predicts from the longest suffix; ``None`` where the model has none.
        index: of the indexed attention, and then the automaton as well; or ``None``.
        keys: [B, ceil(W / 16), H C, 16], of tokens that the index remembers, and which of them are
            held, [B, W] int8; keys of units, [B, 8, H C], and for each twice the token with which
            its unit was known, plus 1 where it sees ahead, [B, 8] int64; or ``None``. Scratch: they
            are made of the tokens when they are read, and never carried.
    """

    num_columns: int
    matrix_states: Array
    recents: Array | None
    slots: tuple[Array, ...] | None
    selective: tuple[Array, ...] | None
    counters: Array
    knows_text: bool
    automaton: AutomatonStream | IndexStream | None
    index: IndexStream | None
    keys: tuple[Array, ...] | None

    @property
    def carried(self) -> tuple[Any, ...]:
        """What the kernel takes of it."""
        return self.matrix_states, self.recents, self.slots, self.selective, self.counters

    @property
    def stream(self) -> AutomatonStream | IndexStream | None:
        """What every token is pushed to: an index is the automaton as well."""
        return self.automaton if self.index is None else self.index

    @property
    def match(self) -> tuple[Array, Array] | None:
        """What the automaton said last, in arrays that it changes in place."""
        if self.automaton is None:
            return None
        return self.automaton.predicted_ids, self.automaton.match_lengths

    @property
    def indexed(self) -> tuple[Array, ...] | None:
        """What the kernel takes of the index: its tokens, the last places, and keys."""
        if self.index is None or self.keys is None:
            return None
        return self.index.tokens, self.index.places, self.index.new_units, *self.keys

    def scratch_bytes(self) -> int:
        """Return the bytes of what is made anew when the streams are gone on with."""
        return sum(array.nbytes for array in self.keys or ())

    def num_bytes(self) -> int:
        """Return the bytes of everything that is carried, as allocated."""
        arrays = [self.matrix_states, *(self.slots or ()), *(self.selective or ()), self.counters]
        if self.recents is not None:
            arrays.append(self.recents)
        num_bytes = sum(array.nbytes for array in arrays)
        stream = self.stream
        if stream is not None:
            num_bytes += sum(tensor.nbytes for tensor in stream.carried)
        return num_bytes


def read_cache(
    cache: UniMatrixCache, config: UniMatrixConfig, num_recent: int, dtype: torch.dtype
) -> StepState:
    """Copy a cache into the arrays of the compiled step.

    Args:
        cache: of the model; not altered, and nothing is shared with it.
        config: the model's.
        num_recent: tokens that the contexts of selective slots reach back; 0 without.
        dtype: of floating state, float32 or float64.
    """
    text_hash = torch.zeros_like(cache.num_tokens) if cache.text_hash is None else cache.text_hash
    counters = torch.stack([cache.num_tokens, cache.last_token_ids, text_hash], dim=1)
    index = _read_index(cache, config)
    return StepState(
        num_columns=cache.num_columns,
        matrix_states=_read_matrix_states(cache, config, dtype),
        recents=_read_recents(cache, config, dtype),
        slots=_read_slots(cache, config, dtype),
        selective=_read_selective(cache, config, num_recent),
        counters=_copy(counters, torch.int64),
        knows_text=cache.text_hash is not None,
        automaton=_read_automaton(cache, config, index),
        index=index,
        keys=_allocate_keys(cache.batch_size, config, dtype),
    )


def _copy(tensor: Tensor, dtype: torch.dtype) -> Array:
    """Return a contiguous copy as an array."""
    copied: Array = tensor.detach().to("cpu", dtype, copy=True).contiguous().numpy()
    return copied


def _read_index(cache: UniMatrixCache, config: UniMatrixConfig) -> IndexStream | None:
    if config.associative_memory != "indexed":
        return None
    state: TextIndex | None = cache.shared.get(IndexedAttention.name)
    if state is not None:
        return IndexStream(copy_index(state))
    assert config.automaton_window is not None
    form = (config.automaton_window, config.vocab_size, config.index_units)
    return IndexStream(empty_index(cache.batch_size, *form))


def _allocate_keys(
    batch: int, config: UniMatrixConfig, dtype: torch.dtype
) -> tuple[Array, ...] | None:
    if config.associative_memory != "indexed":
        return None
    window, inner = config.automaton_window, config.index_heads * config.index_head_dim
    assert window is not None
    floats = np.float64 if dtype == torch.float64 else np.float32
    return (
        np.zeros((batch, -(-window // KEY_BLOCK), inner, KEY_BLOCK), dtype=floats),
        np.zeros((batch, window), dtype=np.int8),
        np.zeros((batch, NUM_RECENT, inner), dtype=floats),
        np.full((batch, NUM_RECENT), -1, dtype=np.int64),
    )


def _read_automaton(
    cache: UniMatrixCache, config: UniMatrixConfig, index: IndexStream | None
) -> AutomatonStream | IndexStream | None:
    if config.residual_path != "suffix_automaton":
        return None
    if index is not None:
        return index
    batch, window, state = cache.batch_size, config.automaton_window, cache.automaton
    if window is None:
        assert not isinstance(state, TextIndex)
        return AutomatonStream(empty_automaton(batch) if state is None else copy_automaton(state))
    if state is None:
        return IndexStream(empty_index(batch, window, config.vocab_size, "none"))
    assert isinstance(state, TextIndex)
    return IndexStream(copy_index(state))


def _read_matrix_states(
    cache: UniMatrixCache, config: UniMatrixConfig, dtype: torch.dtype
) -> Array:
    heads, size = config.num_attention_heads, config.head_dim
    if config.update_rules == "none":
        return _copy(torch.empty(0, cache.batch_size, heads, size, size), dtype)
    empty = MatrixState(torch.zeros(cache.batch_size, heads, size, size))
    states: list[Any] = [states.get(MatrixMixer.name, empty) for states in cache.depth]
    return _copy(torch.stack([state.matrix_state for state in states]).mT, dtype)


def _read_recents(
    cache: UniMatrixCache, config: UniMatrixConfig, dtype: torch.dtype
) -> Array | None:
    if not config.conv_kernel or config.update_rules == "none":
        return None
    empty = torch.zeros(cache.batch_size, config.conv_kernel - 1, config.hidden_size)
    states: list[Any] = [states.get(MatrixMixer.name) for states in cache.depth]
    return _copy(torch.stack([empty if s is None else s.recent for s in states]), dtype)


def _read_slots(
    cache: UniMatrixCache, config: UniMatrixConfig, dtype: torch.dtype
) -> tuple[Array, ...] | None:
    """Return the slots of the groups, and what decisions look at; ``None`` without slots."""
    if config.associative_memory != "slots":
        return None
    batch, width = cache.batch_size, config.hidden_size
    empty = empty_slots(batch, config.num_slots, config.slot_key_size, width, dtype=dtype)
    hidden = config.slot_source == "hidden"
    groups = list(cache.depth) if hidden else [cache.shared]
    start = SlotMixerState(empty.slot_values[:, 0], empty)
    states: list[Any] = [group.get(SlotMixer.name, start) for group in groups]
    previous, held = zip(*states, strict=True)
    keys, values, strengths, ages, ids = (
        torch.stack(list(fields)) for fields in zip(*held, strict=True)
    )
    floats = [_copy(tensor, dtype) for tensor in (keys, values, strengths)]
    units, offsets = np.empty(keys.shape), np.empty(strengths.shape)
    flat = floats[0].reshape(-1, keys.shape[-1])
    prepare_slots(flat, floats[2].reshape(-1), units.reshape(flat.shape), offsets.reshape(-1))
    integers = [_copy(tensor, torch.int64) for tensor in (ages, ids)]
    return (*floats, _copy(torch.stack(list(previous)), dtype), units, offsets, *integers)


def _read_selective(
    cache: UniMatrixCache, config: UniMatrixConfig, num_recent: int
) -> tuple[Array, ...] | None:
    if config.associative_memory != "selective":
        return None
    selective: Any = cache.shared.get(SelectiveMixer.name)
    if selective is None:
        slots = empty_selective_slots(cache.batch_size, config.num_slots, config.vocab_size)
        selective = SelectiveState(slots, torch.full((cache.batch_size, num_recent), -1))
    return tuple(
        _copy(tensor, torch.int64) for tensor in (*selective.slots, selective.recent_token_ids)
    )


def write_cache(
    state: StepState, config: UniMatrixConfig, origin: WeightsOrigin | None
) -> UniMatrixCache:
    """Copy the state into a cache, as ``forward`` would have returned it.

    Args:
        state: not altered, and nothing is shared with it.
        config: the model's.
        origin: the weights that the streams went through.
    """
    num_tokens, last_token_ids, text_hash = torch.from_numpy(state.counters.copy()).unbind(dim=1)
    depth: list[States] = [{} for _ in range(config.num_hidden_layers)]
    shared: States = {}
    if config.update_rules != "none":
        copied = torch.from_numpy(state.matrix_states.copy()).mT.contiguous()
        recents: Any = [None] * config.num_hidden_layers
        if state.recents is not None:
            recents = torch.from_numpy(state.recents.copy())
        for states, matrix_state, recent in zip(depth, copied, recents, strict=True):
            states[MatrixMixer.name] = MatrixState(matrix_state, recent)
    if state.slots is not None:
        groups = depth if config.slot_source == "hidden" else [shared]
        for states, slots in zip(groups, _write_slots(state.slots), strict=True):
            states[SlotMixer.name] = slots
    if state.selective is not None:
        shared[SelectiveMixer.name] = _write_selective(state.selective, config)
    if state.index is not None:
        shared[IndexedAttention.name] = state.index.copy()
    elif state.automaton is not None:
        shared[ResidualContext.name] = state.automaton.copy()
    return UniMatrixCache(
        config_digest=digest_config(config),
        num_columns=state.num_columns,
        num_tokens=num_tokens.contiguous(),
        last_token_ids=last_token_ids.contiguous(),
        depth=tuple(depth),
        shared=shared,
        text_hash=text_hash.contiguous() if state.knows_text else None,
        origin=origin,
        is_sound=True,
    )


def _write_slots(slots: tuple[Array, ...]) -> list[SlotMixerState]:
    """Return the slots of each group."""
    keys, values, strengths, previous, _, _, ages, ids = (
        torch.from_numpy(array.copy()) for array in slots
    )
    return [
        SlotMixerState(previous[g], SlotState(keys[g], values[g], strengths[g], ages[g], ids[g]))
        for g in range(keys.shape[0])
    ]


def _write_selective(selective: tuple[Array, ...], config: UniMatrixConfig) -> SelectiveState:
    keys, values, codes, recent = (torch.from_numpy(array) for array in selective)
    like = empty_selective_slots(1, 1, config.vocab_size)
    slots = SelectiveSlots(
        *(new.to(old.dtype) for new, old in zip((keys, values, codes), like, strict=True))
    )
    return SelectiveState(slots, recent.to(torch.int32))
