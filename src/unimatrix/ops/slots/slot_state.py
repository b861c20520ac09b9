"""What the slots hold, what goes in, what comes out."""

from typing import NamedTuple

import torch
from torch import Tensor


class SlotState(NamedTuple):
    """M slots a row. A slot is filled while its strength is above the strength floor.

    Attributes:
        slot_keys: [B, M, C], as written (not normalised).
        slot_values: [B, M, Dv].
        slot_strength: [B, M] in [0, 1]; 0 in a slot never written.
        slot_age: [B, M] int64, writes since this slot was written.
        slot_token_ids: [B, M] int64, id of the token whose value the slot holds.
    """

    slot_keys: Tensor
    slot_values: Tensor
    slot_strength: Tensor
    slot_age: Tensor
    slot_token_ids: Tensor


class SlotRead(NamedTuple):
    """What every position read, best slot first; weight 0 and id 0 beyond the filled slots.

    Attributes:
        context: [B, T, Dv], the weighted sum of values.
        pointer_token_ids: [B, T, K] int64.
        pointer_weights: [B, T, K], sums to 1 or is 0.
    """

    context: Tensor
    pointer_token_ids: Tensor
    pointer_weights: Tensor


class SlotTokens(NamedTuple):
    """What the tokens bring to the slots, floats already in the compute dtype.

    Attributes:
        queries: [B, T, C], what a token reads with.
        keys: [B, T, C], the key it writes (of the real token before it).
        values: [B, T, Dv], the value it writes.
        strengths: [B, T], the strength it writes.
        token_ids: [B, T] int64, the id it writes.
        reads: [B, T] bool, False on padding.
        writes: [B, T] bool, False on padding and where there is no key.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    strengths: Tensor
    token_ids: Tensor
    reads: Tensor
    writes: Tensor


class SlotRules(NamedTuple):
    """The numbers that govern reading and writing.

    Attributes:
        slots_per_read: K, at most M.
        match_threshold: a cosine above it overwrites the slot.
        strength_floor: a strength above it fills the slot.
    """

    slots_per_read: int
    match_threshold: float
    strength_floor: float


def empty_slots(
    batch: int,
    num_slots: int,
    key_size: int,
    value_size: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> SlotState:
    """Return M slots a row that hold nothing: all zeros, keys of C numbers and values of Dv.

    Keys, values and strengths are of ``dtype``, float32 or float64.
    """
    return SlotState(
        torch.zeros(batch, num_slots, key_size, dtype=dtype, device=device),
        torch.zeros(batch, num_slots, value_size, dtype=dtype, device=device),
        torch.zeros(batch, num_slots, dtype=dtype, device=device),
        torch.zeros(batch, num_slots, dtype=torch.int64, device=device),
        torch.zeros(batch, num_slots, dtype=torch.int64, device=device),
    )
