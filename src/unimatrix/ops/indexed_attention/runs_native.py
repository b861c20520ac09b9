"""Runs: neighbours that read the same columns, and what they read, gathered once for all."""
# mypy: allow-untyped-defs

from unimatrix.ops.indexed_attention.entries import NUM_OFFSETS
from unimatrix.ops.numba.compile import part
from unimatrix.ops.numba.lanes import OPTIONS, at, store, zeros
from unimatrix.ops.numba.tiles import copy_rows


@part(**OPTIONS)
def find_run(most, rows, num_entries, key_rows, is_mixed):
    """Return how many positions from the first on read the same columns of one stream.

    Args:
        most: positions to look at.
        rows: of the entries of the first position, and behind them those of the next.
        num_entries: E.
        key_rows: [E], set to the last of each entry's rows, -1 where no position has it.
        is_mixed: [E], set to 1 where other positions read the row before it, the past-only key.
    """
    for e in range(num_entries):
        key_rows[e], is_mixed[e] = rows[e], 0
    for count in range(1, most):
        entries = at(rows, count * num_entries)
        num_others = 0
        for e in range(num_entries):
            num_others += entries[e] != key_rows[e]
        if num_others == 0:
            continue
        num_others = 0
        for e in range(num_entries):
            is_other = entries[e] >> 1 != key_rows[e] >> 1
            # What has left the window ends a run: boundaries are summed over what is there.
            num_others += is_other and key_rows[e] >= 0
        if num_others:
            return count
        for e in range(num_entries):
            if entries[e] != key_rows[e] and entries[e] >= 0:
                is_mixed[e] |= key_rows[e] >= 0
                key_rows[e] = max(key_rows[e], entries[e])
    return most


@part(**OPTIONS)
def copy_numbers(lanes, source, width, target):
    """Copy a row of any width."""
    whole_lanes = width - width % len(lanes)
    copy_rows(lanes, source, target, whole_lanes)
    for j in range(whole_lanes, width):
        target[j] = source[j]


@part(**OPTIONS)
def turn_rows(lanes, source, stride, count, width, target):
    """Set ``target`` [width, W] to ``count`` rows as columns, zeros behind them."""
    for j in range(width):
        store(target, j * len(lanes), zeros(target, lanes))
        for i in range(count):
            target[j * len(lanes) + i] = source[i * stride + j]


@part(**OPTIONS)
def has_entries(key_rows):
    """Return whether a run reads anything around a place."""
    num_entries = 0
    for offset in range(NUM_OFFSETS):
        num_entries += key_rows[offset] >= 0
    return num_entries > 0


@part(**OPTIONS)
def gather_keys(lanes, keys, stride, width, key_rows, is_mixed, padded, gathered, seconds):
    """Copy the keys around a place; return their number.

    Args:
        keys: of one head and stream, ``stride`` numbers apart.
        key_rows, is_mixed: from ``find_run``, of the place.
        gathered: [2 * 80, padded]; the key of each entry, zeros for none, and then the past-only
            keys of those that have both.
        seconds: [80], set to the entries of these.
    """
    for offset in range(NUM_OFFSETS):
        target = at(gathered, offset * padded)
        if key_rows[offset] >= 0:
            copy_numbers(lanes, at(keys, key_rows[offset] * stride), width, target)
        else:
            for j in range(0, padded, len(lanes)):
                store(target, j, zeros(target, lanes))
    num_keys = NUM_OFFSETS
    for offset in range(NUM_OFFSETS):
        if is_mixed[offset]:
            source = at(keys, (key_rows[offset] - 1) * stride)
            copy_numbers(lanes, source, width, at(gathered, num_keys * padded))
            seconds[num_keys - NUM_OFFSETS] = offset
            num_keys += 1
    return num_keys


@part(**OPTIONS)
def gather_values(lanes, values, stride, width, key_rows, padded, gathered):
    """Copy the values around a place, zeros for no entry; arguments as of ``gather_keys``."""
    for offset in range(NUM_OFFSETS):
        target = at(gathered, offset * padded)
        if key_rows[offset] >= 0:
            copy_numbers(lanes, at(values, (key_rows[offset] >> 1) * stride), width, target)
        else:
            for j in range(0, padded, len(lanes)):
                store(target, j, zeros(target, lanes))
