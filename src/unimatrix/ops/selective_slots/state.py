"""What selective slots hold, what goes in, what comes out."""

from typing import NamedTuple

import torch
from torch import Tensor

CODES_PER_NAT = 8
"""Strength codes a unit of the gate's logit: strength = sigmoid(code / 8)."""
MIN_CODE, MAX_CODE = -128, 127

# Constants of SplitMix64 (Steele, Lea, Flood 2014), as signed numbers: sums wrap around.
HASH_STEP = -7046029254386353131
HASH_MIX = -4658895280553007687
HASH_MASK = 2**31 - 1

NO_KEY = -1
NO_VALUE = -1
_LARGEST_INT16 = 2**15 - 1


class SelectiveSlots(NamedTuple):
    """M slots a row.

    Attributes:
        slot_keys: [B, M] int32, hash of the context; -1 in an empty slot.
        slot_value_ids: [B, M] int16 or int32, the token that followed it; -1 in an empty slot.
        slot_codes: [B, M] int8, strength code; sigmoid(code / 8) is the strength.
    """

    slot_keys: Tensor
    slot_value_ids: Tensor
    slot_codes: Tensor


class SlotLookup(NamedTuple):
    """What every position found.

    Entries are the initial slots 0..M-1, then the writes M + t N + n of pattern n at token t.

    Attributes:
        entries: [B, T, Q] int64, the entry that held the context, -1 for none.
        codes: [B, T, Q] int64, its strength code then, fading included; 0 for none.
        value_ids: [B, T, Q] int64, the token it holds; 0 for none.
    """

    entries: Tensor
    codes: Tensor
    value_ids: Tensor


class SlotScan(NamedTuple):
    """What a scan returns.

    Attributes:
        lookup: what every position found.
        slots: the slots after the last token; ``None`` without a bound.
        writers: [B, M] int64, the entry in each of them; ``None`` without a bound.
    """

    lookup: SlotLookup
    slots: SelectiveSlots | None
    writers: Tensor | None


class SlotWrites(NamedTuple):
    """What the tokens look up and offer.

    Attributes:
        read_keys: [B, T, Q] int64, contexts to look up, -1 for none.
        write_keys: [B, T, N] int64, contexts offered, -1 for none.
        value_ids: [B, T] int64, the value of a token's writes.
        codes: [B, T, N] int64 in -128..127.
        first_position: [B] int64, real tokens of the row before these.
        lengths: [B] int64, real tokens of the row among these.
    """

    read_keys: Tensor
    write_keys: Tensor
    value_ids: Tensor
    codes: Tensor
    first_position: Tensor
    lengths: Tensor


class SlotPolicy(NamedTuple):
    """The numbers that govern writing.

    Attributes:
        bounded: M slots; otherwise every write has a place, and none is returned at the end.
        margin: codes by which a write must exceed the slot that it displaces.
        keep_first: a context met again keeps its first value unless the new one is stronger.
        fade_tokens: codes of all slots fall by one every so many tokens; 0 is never.
    """

    bounded: bool
    margin: int
    keep_first: bool
    fade_tokens: int


def encode_strengths(logits: Tensor) -> Tensor:
    """Return the codes of strengths, int64 [...]: logits [...] in eighths, cut to a byte."""
    return (logits.detach() * CODES_PER_NAT).round().clamp(MIN_CODE, MAX_CODE).long()


def empty_selective_slots(
    batch: int, num_slots: int, vocab_size: int, *, device: torch.device | str | None = None
) -> SelectiveSlots:
    """Return M slots a row that hold nothing; V, the vocabulary, decides the bytes of a value."""
    ids = torch.int16 if vocab_size <= _LARGEST_INT16 else torch.int32
    shape = (batch, num_slots)
    return SelectiveSlots(
        torch.full(shape, NO_KEY, dtype=torch.int32, device=device),
        torch.full(shape, NO_VALUE, dtype=ids, device=device),
        torch.full(shape, MIN_CODE, dtype=torch.int8, device=device),
    )
