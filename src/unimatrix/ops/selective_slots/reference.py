"""Selective slots as the loop of the equations, one token after another."""

import torch

from unimatrix.ops.selective_slots.state import (
    MIN_CODE,
    NO_KEY,
    NO_VALUE,
    SelectiveSlots,
    SlotLookup,
    SlotPolicy,
    SlotScan,
    SlotWrites,
)


class _Slot:
    """One place: what it holds and which entry wrote it."""

    def __init__(self, key: int, value_id: int, code: int, entry: int) -> None:
        self.key, self.value_id, self.code, self.entry = key, value_id, code, entry

    @property
    def is_empty(self) -> bool:
        """Whether it holds nothing."""
        return self.value_id == NO_VALUE


def scan_reference(writes: SlotWrites, initial: SelectiveSlots, policy: SlotPolicy) -> SlotScan:
    """Look up, then write, token by token: E13 and E14."""
    batch, num_tokens, num_reads = writes.read_keys.shape
    num_initial = initial.slot_keys.shape[1]
    lookup = SlotLookup(
        torch.full((batch, num_tokens, num_reads), -1, dtype=torch.int64),
        torch.zeros((batch, num_tokens, num_reads), dtype=torch.int64),
        torch.zeros((batch, num_tokens, num_reads), dtype=torch.int64),
    )
    final = SelectiveSlots(*(tensor.clone() for tensor in initial))
    writers = torch.zeros((batch, num_initial), dtype=torch.int64)
    for b in range(batch):
        row = zip(*(tensor[b].tolist() for tensor in initial), strict=True)
        slots = [_Slot(key, value, code, m) for m, (key, value, code) in enumerate(row)]
        for t in range(int(writes.lengths[b])):
            position = int(writes.first_position[b]) + t
            if policy.fade_tokens and position and position % policy.fade_tokens == 0:
                for slot in slots:
                    slot.code = max(slot.code - 1, MIN_CODE)
            for q in range(num_reads):
                found = _find(slots, int(writes.read_keys[b, t, q]))
                if found is not None:
                    lookup.entries[b, t, q] = found.entry
                    lookup.codes[b, t, q] = found.code
                    lookup.value_ids[b, t, q] = found.value_id
            for n in range(writes.write_keys.shape[2]):
                key = int(writes.write_keys[b, t, n])
                if key != NO_KEY:
                    entry = num_initial + t * writes.write_keys.shape[2] + n
                    code = int(writes.codes[b, t, n])
                    _offer(slots, _Slot(key, int(writes.value_ids[b, t]), code, entry), policy)
        if policy.bounded:
            for m, slot in enumerate(slots):
                final.slot_keys[b, m] = slot.key
                final.slot_value_ids[b, m] = slot.value_id
                final.slot_codes[b, m] = slot.code
                writers[b, m] = slot.entry
    if not policy.bounded:
        return SlotScan(lookup, None, None)
    return SlotScan(lookup, final, writers)


def _find(slots: list[_Slot], key: int) -> _Slot | None:
    """Return the slot that holds a context."""
    if key == NO_KEY:
        return None
    return next((slot for slot in slots if not slot.is_empty and slot.key == key), None)


def _offer(slots: list[_Slot], new: _Slot, policy: SlotPolicy) -> None:
    """Write to the same context, an empty place or a weaker one, or refuse."""
    held = _find(slots, new.key)
    if held is not None:
        needed = held.code + policy.margin + 1 if policy.keep_first else held.code - policy.margin
        if new.code >= needed:
            slots[slots.index(held)] = new
        return
    empty = next((m for m, slot in enumerate(slots) if slot.is_empty), None)
    if empty is not None:
        slots[empty] = new
        return
    if not policy.bounded:
        slots.append(new)
        return
    weakest = min(range(len(slots)), key=lambda m: slots[m].code)
    if new.code > slots[weakest].code + policy.margin:
        slots[weakest] = new
