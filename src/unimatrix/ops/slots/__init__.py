"""Sparse slots: exact bindings in M places, read by cosine and strength, written one a token.

Each token first reads its K best slots (E6, E9), then writes one slot (E7) with a strength that
enters later reads by its logarithm (E8). Which slot is written has no gradient, so the fast back
ends decide first and read afterwards.
"""

from unimatrix.ops.slots.scan import choose_backend, scan_slots
from unimatrix.ops.slots.slot_state import SlotRead, SlotState, empty_slots

__all__ = ["SlotRead", "SlotState", "choose_backend", "empty_slots", "scan_slots"]
