"""Selective slots in Numba, rows over threads: a table of M places, or a hash table of all."""

from typing import Any

import numpy as np
import torch

from unimatrix.ops.numba.compile import kernel, part
from unimatrix.ops.numba.threads import Shaped, map_rows
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

Array = np.ndarray[Any, Any]

_COMPARISON = 4
"""Multiply-adds in the time that a comparison takes."""


@part()
def _find(keys: Array, key: int) -> int:
    """Return the slot that holds a context, -1 for none."""
    for m in range(keys.shape[0]):
        if keys[m] == key:
            return m
    return -1


@part()
def _find_place(keys: Array, codes: Array, margin: int, code: int) -> int:
    """Return the first empty slot, else the weakest if the new code exceeds it, else -1."""
    weakest = 0
    for m in range(keys.shape[0]):
        if keys[m] == NO_KEY:
            return m
        if codes[m] < codes[weakest]:
            weakest = m
    return weakest if code > codes[weakest] + margin else -1


@part()
def _may_overwrite(new_code: int, held_code: int, margin: int, keep_first: bool) -> bool:
    """Return whether a context met again takes the new value."""
    if keep_first:
        return new_code > held_code + margin
    return new_code >= held_code - margin


@kernel()
def _scan_rows(
    first_row: int,
    last_row: int,
    read_keys: Array,  # [B, T, Q]
    write_keys: Array,  # [B, T, N]
    value_ids: Array,  # [B, T]
    write_codes: Array,  # [B, T, N]
    first_position: Array,  # [B]
    lengths: Array,  # [B]
    margin: int,
    keep_first: bool,
    fade_tokens: int,
    keys: Array,  # [B, M] int64, the initial slots, then the final ones
    values: Array,  # [B, M] int64, likewise
    codes: Array,  # [B, M] int64, likewise
    writers: Array,  # [B, M] int64, the entry in each slot
    found: Array,  # [B, T, Q], -1
    found_codes: Array,  # [B, T, Q], 0
    found_values: Array,  # [B, T, Q], 0
) -> None:
    num_slots, num_writes = keys.shape[1], write_keys.shape[2]
    for b in range(first_row, last_row):
        for m in range(num_slots):
            writers[b, m] = m
        for t in range(lengths[b]):
            position = first_position[b] + t
            if fade_tokens > 0 and position > 0 and position % fade_tokens == 0:
                for m in range(num_slots):
                    codes[b, m] = max(codes[b, m] - 1, MIN_CODE)
            for q in range(read_keys.shape[2]):
                if read_keys[b, t, q] == NO_KEY:
                    continue
                m = _find(keys[b], read_keys[b, t, q])
                if m >= 0:
                    found[b, t, q] = writers[b, m]
                    found_codes[b, t, q] = codes[b, m]
                    found_values[b, t, q] = values[b, m]
            for n in range(num_writes):
                key, code = write_keys[b, t, n], write_codes[b, t, n]
                if key == NO_KEY:
                    continue
                m = _find(keys[b], key)
                if m < 0:
                    m = _find_place(keys[b], codes[b], margin, code)
                elif not _may_overwrite(code, codes[b, m], margin, keep_first):
                    m = -1
                if m >= 0:
                    keys[b, m], codes[b, m] = key, code
                    values[b, m] = value_ids[b, t]
                    writers[b, m] = num_slots + t * num_writes + n


@part()
def _probe(keys: Array, key: int) -> int:
    """Return where a context is, or would go, in an open hash table of a power of two places."""
    mask = keys.shape[0] - 1
    place: int = (key * 2654435761) >> 7 & mask
    while keys[place] not in (key, NO_KEY):
        place = (place + 1) & mask
    return place


@kernel()
def _scan_rows_unbounded(
    first_row: int,
    last_row: int,
    read_keys: Array,
    write_keys: Array,
    value_ids: Array,
    write_codes: Array,
    first_position: Array,
    lengths: Array,
    margin: int,
    keep_first: bool,
    fade_tokens: int,
    keys: Array,  # [B, M] int64, the initial slots
    values: Array,
    codes: Array,
    _: Array,
    found: Array,
    found_codes: Array,
    found_values: Array,
) -> None:
    num_initial, num_writes = keys.shape[1], write_keys.shape[2]
    size = 16
    while size < 2 * (num_initial + write_keys.shape[1] * num_writes):
        size *= 2
    table = np.empty(size, dtype=np.int64)
    held_values = np.empty(size, dtype=np.int64)
    held_codes = np.empty(size, dtype=np.int64)  # as written
    held_fades = np.empty(size, dtype=np.int64)  # fades until then
    writers = np.empty(size, dtype=np.int64)
    for b in range(first_row, last_row):
        for place in range(size):
            table[place] = NO_KEY
        fades = 0
        for m in range(num_initial):
            if values[b, m] != NO_VALUE:
                place = _probe(table, keys[b, m])
                table[place], held_values[place] = keys[b, m], values[b, m]
                held_codes[place], held_fades[place], writers[place] = codes[b, m], 0, m
        for t in range(lengths[b]):
            position = first_position[b] + t
            if fade_tokens > 0 and position > 0 and position % fade_tokens == 0:
                fades += 1
            for q in range(read_keys.shape[2]):
                if read_keys[b, t, q] == NO_KEY:
                    continue
                place = _probe(table, read_keys[b, t, q])
                if table[place] != NO_KEY:
                    faded = held_codes[place] - (fades - held_fades[place])
                    found[b, t, q] = writers[place]
                    found_codes[b, t, q] = max(faded, MIN_CODE)
                    found_values[b, t, q] = held_values[place]
            for n in range(num_writes):
                key, code = write_keys[b, t, n], write_codes[b, t, n]
                if key == NO_KEY:
                    continue
                place = _probe(table, key)
                if table[place] != NO_KEY:
                    faded = max(held_codes[place] - (fades - held_fades[place]), MIN_CODE)
                    if not _may_overwrite(code, faded, margin, keep_first):
                        continue
                table[place], held_values[place] = key, value_ids[b, t]
                held_codes[place], held_fades[place] = code, fades
                writers[place] = num_initial + t * num_writes + n


def scan_native(writes: SlotWrites, initial: SelectiveSlots, policy: SlotPolicy) -> SlotScan:
    """Compute E13 and E14.

    Cost: O(B T (Q + N) M) comparisons with M slots; O(B T (Q + N)) without a bound, and 80 bytes a
        write of scratch a thread.
    """
    shape = writes.read_keys.shape
    lookup = SlotLookup(
        torch.full(shape, -1, dtype=torch.int64),
        torch.zeros(shape, dtype=torch.int64),
        torch.zeros(shape, dtype=torch.int64),
    )
    held = [tensor.to(torch.int64, copy=True).contiguous() for tensor in initial]
    writers = torch.zeros_like(held[0])
    inputs = [Shaped(tensor.contiguous()) for tensor in writes]
    rules = (policy.margin, policy.keep_first, policy.fade_tokens)
    results = [Shaped(tensor) for tensor in (*held, writers, *lookup)]
    kernel = _scan_rows if policy.bounded else _scan_rows_unbounded
    work = writes.write_keys.numel() * (max(held[0].shape[1], 8) if policy.bounded else 8)
    map_rows(kernel, shape[0], *inputs, *rules, *results, work=_COMPARISON * work)
    if not policy.bounded:
        return SlotScan(lookup, None, None)
    pairs = zip(held, initial, strict=True)
    slots = SelectiveSlots(*(new.to(old.dtype) for new, old in pairs))
    return SlotScan(lookup, slots, writers)
