"""One token of one row's slots, in place: read, then write (E6 to E9).

The decision units of the slots' keys stay with the slots, so that a token costs two exact cosines a
slot and nothing is computed anew. Decisions are those of ``native.py``, by its own functions.
"""

import math
from typing import Any

import numpy as np

from unimatrix.ops.cosine_read import LOGIT_SCALE, MIN_NORM, UNIT_GRID
from unimatrix.ops.numba.compile import kernel, part
from unimatrix.ops.slots.decisions import MIN_STRENGTH
from unimatrix.ops.slots.native import _choose_slot, _compute_unit, _dot

Array = np.ndarray[Any, Any]


@part(fastmath={"reassoc", "contract", "nsz"})
def _compute_wide_norm(vectors: Array, i: int) -> float:
    """Return max(norm, 1e-12) of row i, its squares summed in float64."""
    total = 0.0
    for c in range(vectors.shape[1]):
        number = np.float64(vectors[i, c])
        total += number * number
    return max(math.sqrt(total), MIN_NORM)


@part()
def find_unit(vectors: Array, i: int, units: Array, j: int) -> None:
    """Write the decision unit of row i of ``vectors`` to row j of ``units``."""
    _compute_unit(vectors, i, _compute_wide_norm(vectors, i), units, j)


@part()
def find_offset(strength: float, key_size: int) -> float:
    """Return what a strength adds to the rank of its slot: ``decisions.prepare_strengths``."""
    offset = math.sqrt(key_size) * math.log(max(np.float64(strength), MIN_STRENGTH))
    return float(np.rint(offset / UNIT_GRID) * UNIT_GRID)


@part(fastmath={"reassoc", "contract", "nsz"})
def _find_cosine(queries: Array, b: int, keys: Array, m: int) -> float:
    """Return the cosine of two rows, in float64."""
    total, key_total, query_total = 0.0, 0.0, 0.0
    for c in range(queries.shape[1]):
        query, key = np.float64(queries[b, c]), np.float64(keys[m, c])
        total += query * key
        key_total += key * key
        query_total += query * query
    norm = max(math.sqrt(key_total), MIN_NORM) * max(math.sqrt(query_total), MIN_NORM)
    return total / norm


@part()
def _insert(ranks: Array, slots: Array, count: int, rank: float, slot: int) -> int:
    """Insert ``slot`` into the best K, sorted by rank; return how many there are."""
    last: int = min(count, ranks.shape[0] - 1)
    if count == ranks.shape[0] and rank <= ranks[last]:
        return count
    place = last
    while place > 0 and rank > ranks[place - 1]:
        ranks[place] = ranks[place - 1]
        slots[place] = slots[place - 1]
        place -= 1
    ranks[place] = rank
    slots[place] = slot
    return last + 1


@part()
def advance_slots(
    b: int,  # row of the next three
    queries: Array,  # [B, C]
    new_keys: Array,  # [B, C]
    new_values: Array,  # [B, D]
    new_strength: float,
    token_id: int,
    writes: bool,
    threshold: float,
    strength_floor: float,
    keys: Array,  # [M, C], as the nine after it changed here
    values: Array,  # [M, D]
    strengths: Array,  # [M]
    units: Array,  # [M, C] float64, decision units of the keys
    offsets: Array,  # [M] float64
    ages: Array,  # [M] int64
    token_ids: Array,  # [M] int64
    context: Array,  # [D], written here
    read_ids: Array,  # [K] int64, written here
    weights: Array,  # [K], written here
) -> None:
    """Read the K best slots with a token's query, then write its key and value."""
    num_slots, key_size = keys.shape
    unit = np.empty((2, key_size))  # of the query and of the new key
    find_unit(queries, b, unit, 0)
    find_unit(new_keys, b, unit, 1)
    filled = np.empty(num_slots, dtype=np.bool_)
    ranks = np.empty(read_ids.shape[0])
    best = np.empty(read_ids.shape[0], dtype=np.int64)
    count, match, closest = 0, 0, -np.inf
    for m in range(num_slots):
        filled[m] = np.float64(strengths[m]) > strength_floor
        if not filled[m]:
            continue
        cosine = _dot(unit, 1, units, m)
        if writes and cosine > closest:
            closest, match = cosine, m
        count = _insert(ranks, best, count, _dot(unit, 0, units, m) + offsets[m], m)
    for c in range(context.shape[0]):
        context[c] = 0.0
    for i in range(read_ids.shape[0]):
        read_ids[i], weights[i] = 0, 0.0
    scale = 1.0 / math.sqrt(key_size)
    largest, total = -np.inf, 0.0
    for i in range(count):
        m = best[i]
        log_strength = math.log(max(np.float64(strengths[m]), MIN_STRENGTH))
        ranks[i] = LOGIT_SCALE * (_find_cosine(queries, b, keys, m) * scale + log_strength)
        largest = max(largest, ranks[i])
    for i in range(count):
        ranks[i] = math.exp(ranks[i] - largest)
        total += ranks[i]
    for i in range(count):
        m = best[i]
        weights[i] = ranks[i] / total
        read_ids[i] = token_ids[m]
        for c in range(values.shape[1]):
            context[c] += weights[i] * values[m, c]
    if writes:
        slot = _choose_slot(closest, match, filled, ages, threshold)
        for m in range(num_slots):
            ages[m] += filled[m]
        ages[slot] = 0
        for c in range(key_size):
            keys[slot, c], units[slot, c] = new_keys[b, c], unit[1, c]
        for c in range(values.shape[1]):
            values[slot, c] = new_values[b, c]
        strengths[slot] = new_strength
        token_ids[slot] = token_id
        offsets[slot] = find_offset(strengths[slot], key_size)


@kernel()
def prepare_slots(keys: Array, strengths: Array, units: Array, offsets: Array) -> None:
    """Compute the decision units [P, C] and offsets [P] of P slots."""
    for i in range(keys.shape[0]):
        find_unit(keys, i, units, i)
        offsets[i] = find_offset(strengths[i], keys.shape[1])
