"""Selective slots in Triton, on a GPU: a program a row, its places one tile of whole numbers.

Without a bound it is the same scan over as many places as there are writes: every comparison is
then made with all of them, so it is for as many as a program can hold.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl

from unimatrix.ops.selective_slots.state import (
    MAX_CODE,
    MIN_CODE,
    NO_KEY,
    SelectiveSlots,
    SlotLookup,
    SlotPolicy,
    SlotScan,
    SlotWrites,
)


@triton.jit
def _scan_row(
    read_keys,  # [B, T, Q]
    write_keys,  # [B, T, N]
    value_ids,  # [B, T]
    write_codes,  # [B, T, N]
    first_position,  # [B]
    lengths,  # [B]
    slot_keys,  # [B, M], the initial slots
    slot_values,
    slot_codes,
    found,  # [B, T, Q] int64, written here as all below; holds -1
    found_codes,  # [B, T, Q] int64, holds 0
    found_values,  # [B, T, Q] int64, holds 0
    final_keys,  # [B, M]
    final_values,
    final_codes,
    final_writers,  # [B, M] int64
    T,
    M: tl.constexpr,
    Q: tl.constexpr,
    N: tl.constexpr,
    PLACES: tl.constexpr,
    BOUNDED: tl.constexpr,
    MARGIN: tl.constexpr,
    KEEP_FIRST: tl.constexpr,
    FADE_TOKENS: tl.constexpr,
    NO_KEY: tl.constexpr,
    MIN_CODE: tl.constexpr,
    ABOVE_ALL: tl.constexpr,
):
    # What a write may take, in this order: its context's own place, an empty one, the weakest.
    NUM_CODES: tl.constexpr = ABOVE_ALL + 1 - MIN_CODE
    EMPTY: tl.constexpr = MIN_CODE - 1
    OWN: tl.constexpr = -2 * NUM_CODES  # added to the code that is there
    b = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, PLACES)
    is_slot, at = place < M, b * M + place
    # With a bound, a place beyond M is neither empty nor the weakest, and holds no context.
    beyond_key: tl.constexpr = NO_KEY - 1 if BOUNDED else NO_KEY
    key = tl.load(slot_keys + at, mask=is_slot, other=beyond_key).to(tl.int32)
    value = tl.load(slot_values + at, mask=is_slot, other=0).to(tl.int32)
    code = tl.load(slot_codes + at, mask=is_slot, other=0).to(tl.int32)
    code = tl.where(is_slot, code, ABOVE_ALL)
    writer = place
    position = tl.load(first_position + b)
    for t in range(tl.minimum(tl.load(lengths + b), T).to(tl.int32)):
        if FADE_TOKENS > 0:
            fades = (position > 0) & (position % FADE_TOKENS == 0)
            lower = tl.where(code > MIN_CODE, code - 1, MIN_CODE)
            code = tl.where(fades & (code < ABOVE_ALL), lower, code)
        token = b * T + t
        for i in range(Q):
            read_key = tl.load(read_keys + token * Q + i).to(tl.int32)
            # At most one place holds a context: it writes what was found, without a search.
            holds = (key == read_key) & (read_key != NO_KEY)
            place_of = token * Q + i + tl.zeros_like(place)
            tl.store(found + place_of, writer.to(tl.int64), mask=holds)
            tl.store(found_codes + place_of, code.to(tl.int64), mask=holds)
            tl.store(found_values + place_of, value.to(tl.int64), mask=holds)
        new_value = tl.load(value_ids + token).to(tl.int32)
        for n in range(N):
            new_key = tl.load(write_keys + token * N + n).to(tl.int32)
            new_code = tl.load(write_codes + token * N + n).to(tl.int32)
            rank = tl.where(key == new_key, OWN + code, tl.where(key == NO_KEY, EMPTY, code))
            # The only reduction a token waits for: the least rank and, in its lowest bits, where.
            least = tl.min(rank * PLACES + place, 0)
            target = least & (PLACES - 1)
            least = (least - target) // PLACES
            if KEEP_FIRST:
                takes_own = new_code > least - OWN + MARGIN
            else:
                takes_own = new_code >= least - OWN - MARGIN
            takes_other = (least == EMPTY) | (new_code > least + MARGIN)
            takes = tl.where(least < EMPTY, takes_own, takes_other) & (new_key != NO_KEY)
            written = (place == target) & takes
            key = tl.where(written, new_key, key)
            value = tl.where(written, new_value, value)
            code = tl.where(written, new_code, code)
            writer = tl.where(written, M + t * N + n, writer)
        position += 1
    if BOUNDED:
        tl.store(final_keys + at, key.to(final_keys.dtype.element_ty), mask=is_slot)
        tl.store(final_values + at, value.to(final_values.dtype.element_ty), mask=is_slot)
        tl.store(final_codes + at, code.to(final_codes.dtype.element_ty), mask=is_slot)
        tl.store(final_writers + at, writer.to(tl.int64), mask=is_slot)


def choose_warps(places: int) -> int:
    """Return the warps of a program: one finds a minimum without waiting for others."""
    return min(8, max(1, places // 256))


def scan_triton(
    writes: SlotWrites, initial: SelectiveSlots, policy: SlotPolicy, num_places: int
) -> SlotScan:
    """Compute E13 and E14.

    Args:
        writes: what the tokens look up and offer, on the device.
        initial: the M slots before the first token.
        policy: the numbers that govern writing.
        num_places: M; without a bound, M and one for each write.

    Cost: T (Q + N) steps of O(places) work, all rows at once; no scratch.
    """
    (B, T, Q), N, M = writes.read_keys.shape, writes.write_keys.shape[2], initial[0].shape[1]
    # Made from shapes: contiguous, whatever the strides of the inputs.
    shape, held = writes.read_keys.shape, initial.slot_keys
    lookup = SlotLookup(
        writes.read_keys.new_full(shape, -1),
        writes.read_keys.new_zeros(shape),
        writes.read_keys.new_zeros(shape),
    )
    slots = SelectiveSlots(*(tensor.new_empty(tensor.shape) for tensor in initial))
    writers = held.new_empty(held.shape, dtype=torch.int64)
    places = triton.next_power_of_2(num_places)
    with torch.cuda.device_of(writes.read_keys):
        _scan_row[B,](
            *(tensor.contiguous() for tensor in (*writes, *initial)),
            *lookup,
            *slots,
            writers,
            T,
            M,
            Q,
            N,
            places,
            policy.bounded,
            policy.margin,
            policy.keep_first,
            policy.fade_tokens,
            NO_KEY,
            MIN_CODE,
            MAX_CODE + 1,
            num_warps=choose_warps(places),
        )
    return SlotScan(lookup, slots, writers) if policy.bounded else SlotScan(lookup, None, None)
