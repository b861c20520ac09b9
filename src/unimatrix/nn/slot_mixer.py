"""Projections and gates around the sparse slots."""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from unimatrix.configuration import UniMatrixConfig
from unimatrix.nn.associative_projections import AssociativeProjections, ProductKeys
from unimatrix.nn.mixer import StateTensor, Tokens, Votes
from unimatrix.nn.previous_token import shift_to_previous, take_last
from unimatrix.ops.slots import SlotRead, SlotState, empty_slots, scan_slots


class SlotMixerState(NamedTuple):
    """What the slots carry from call to call.

    Attributes:
        previous: [B, D], source feature of the last real token.
        slots: the M slots.
    """

    previous: Tensor
    slots: SlotState


class SlotMixer(AssociativeProjections):
    """Read exact bindings from M slots, then write (key of t - 1, value of t).

    Equation: E6 to E9, E20, E21.
    Source: paper, section on SparsePointer; ``docs/deviations.md`` D2 to D5.

    Args:
        config: uses D, C, M, K, thresholds, ``write_gate``, ``pointer``, ``product_key_codes`` and
            ``slot_hops``.
    """

    name, operator, part = "slot_mixer", "slots", "slots"
    State, state_prefix = SlotMixerState, "associations."

    def __init__(self, config: UniMatrixConfig) -> None:
        super().__init__(config)
        self.votes = self.reads_ids = config.pointer
        self.num_slots = config.num_slots
        self.slots_per_read = config.slots_per_read
        self.match_threshold = config.match_threshold
        self.strength_floor = config.strength_floor
        self.write_gate = nn.Linear(2 * config.hidden_size, 1) if config.write_gate else None
        self.pointer_gate = nn.Linear(config.hidden_size, 1) if config.pointer else None
        self.product_keys = None
        if config.product_key_codes:
            self.product_keys = ProductKeys(self.key_size, config.product_key_codes)
        self.hop_projs = nn.ModuleList(
            nn.Linear(config.hidden_size, self.key_size, bias=False)
            for _ in range(config.slot_hops - 1)
        )

    @classmethod
    def list_state_fields(cls, config: UniMatrixConfig) -> tuple[str, ...]:
        """See ``Mixer.list_state_fields``."""
        of_slots = ("num_slots", "match_threshold", "strength_floor")
        return (*super().list_state_fields(config), *of_slots)

    @classmethod
    def list_state_tensors(cls, config: UniMatrixConfig) -> dict[str, StateTensor]:
        """See ``Mixer.list_state_tensors``."""
        M = config.num_slots
        return super().list_state_tensors(config) | {
            "slots.slot_keys": StateTensor((M, config.slot_key_size)),
            "slots.slot_values": StateTensor((M, config.hidden_size)),
            "slots.slot_strength": StateTensor((M,)),
            "slots.slot_age": StateTensor((M,), "int64"),
            "slots.slot_token_ids": StateTensor((M,), "int64", is_ids=True),
        }

    def forward(
        self, source: Tensor, tokens: Tokens, state: SlotMixerState | None
    ) -> tuple[SlotRead, SlotMixerState]:
        """Read, then write, at every position; see ``Mixer.forward``."""
        source = source if self.reads_at is None else tokens.embeddings
        previous, slots = (None, None) if state is None else state
        before = shift_to_previous(source, previous)  # [B, T, D]
        keys = self.key_proj(before)
        if self.product_keys is not None:
            keys = self.product_keys(keys)
        scan = partial(
            scan_slots,
            keys=keys,
            values=self.value_proj(source),
            strengths=self._weigh_writes(before, source),
            token_ids=tokens.ids,
            writable=tokens.writable,
            slots_per_read=self.slots_per_read,
            initial=self._start(source) if slots is None else slots,
            match_threshold=self.match_threshold,
            strength_floor=self.strength_floor,
            lengths=tokens.lengths,
            **self.operator_options,
        )
        queries = self.query_proj(source)
        read, final = scan(queries=queries)
        for hop_proj in self.hop_projs:  # what is written does not depend on what is asked
            queries = queries + hop_proj(read.context)
            read, _ = scan(queries=queries)
        return read, SlotMixerState(take_last(source, tokens.lengths, previous), final)

    def _weigh_writes(self, before: Tensor, source: Tensor) -> Tensor:
        """Return the strength of each write, [B, T]; features [B, T, D] of t - 1 and t."""
        if self.write_gate is None:
            return torch.ones_like(source[..., 0])
        pair = torch.cat([before, source], dim=-1)  # [B, T, 2 D]
        return torch.sigmoid(self.write_gate(pair)).squeeze(-1)

    def _start(self, source: Tensor) -> SlotState:
        """Return the slots of an empty stream."""
        return empty_slots(
            source.shape[0],
            self.num_slots,
            self.key_size,
            self.value_size,
            dtype=torch.promote_types(source.dtype, torch.float32),
            device=source.device,
        )

    def vote(self, h: Tensor, read: SlotRead) -> Votes:
        """Return the ids of the slots read and their gated weights (E9); see ``Mixer.vote``."""
        assert self.pointer_gate is not None
        weights = torch.sigmoid(self.pointer_gate(h)) * read.pointer_weights  # [B, T, K]
        return read.pointer_token_ids, weights
