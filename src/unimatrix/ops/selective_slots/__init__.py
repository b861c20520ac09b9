"""Selective slots: M places for (context, token that followed), given by learned strength.

Each token first looks up its contexts (E13), then offers one write per context pattern: the context
that ended before the token, its id as the value, and a strength. A write takes the place of the
same context, an empty place, or a weaker one, or it is refused (E14). Keys are compared for
equality, values are token ids and strengths are whole numbers, so a decision is the same on every
back end and at every split, and a slot is a few bytes.
"""

from unimatrix.ops.selective_slots.keys import hash_contexts
from unimatrix.ops.selective_slots.scan import choose_backend, scan_selective_slots
from unimatrix.ops.selective_slots.state import (
    CODES_PER_NAT,
    MAX_CODE,
    MIN_CODE,
    NO_KEY,
    SelectiveSlots,
    SlotLookup,
    SlotScan,
    empty_selective_slots,
    encode_strengths,
)

__all__ = [
    "CODES_PER_NAT",
    "MAX_CODE",
    "MIN_CODE",
    "NO_KEY",
    "SelectiveSlots",
    "SlotLookup",
    "SlotScan",
    "choose_backend",
    "empty_selective_slots",
    "encode_strengths",
    "hash_contexts",
    "scan_selective_slots",
]
