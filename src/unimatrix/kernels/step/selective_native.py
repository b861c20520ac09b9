"""The selective slots of one decode step: from the tokens' contexts to what they read."""
# mypy: allow-untyped-defs

import math

import numpy as np

from unimatrix.kernels.step import layout as at
from unimatrix.kernels.step.vectors_native import (
    OPTIONS,
    copy,
    fill,
    gelu,
    get_row,
    log_sigmoid,
    project,
    scale_to_unit_square,
)
from unimatrix.ops.numba.compile import part
from unimatrix.ops.selective_slots.native_step import hash_context, scan_token
from unimatrix.ops.selective_slots.state import CODES_PER_NAT, MAX_CODE, MIN_CODE


@part(**OPTIONS)
def _weigh_writes(token_ids, hidden, weights, offsets, sizes, counters, width, logits):
    """Write the gate's logits [B, N] of this token's writes."""
    batch = token_ids.shape[0]
    inputs = np.empty((batch, (3 if sizes[at.FROM_HIDDEN] else 2) * width), weights.dtype)
    # What ``rms_norm`` adds where nothing is said: the machine's epsilon.
    eps = np.float64(np.finfo(weights.dtype).eps)
    for b in range(batch):
        before = counters[b, at.LAST_TOKEN_ID]
        fill(inputs[b], 0.0)
        if before >= 0:
            copy(get_row(weights, offsets[at.EMBED], before, width), inputs[b])
        copy(get_row(weights, offsets[at.EMBED], token_ids[b], width), inputs[b, width:])
        if sizes[at.FROM_HIDDEN]:
            copy(hidden[b], inputs[b, 2 * width :])
        for first in range(0, inputs.shape[1], width):
            scale_to_unit_square(inputs[b, first : first + width], eps)
    inner = np.empty((batch, width // 2), weights.dtype)
    project(weights, offsets[at.GATE_UP], offsets[at.GATE_UP_BIAS], inputs, inner)
    for b in range(batch):
        for i in range(inner.shape[1]):
            inner[b, i] = gelu(inner[b, i])
    project(weights, offsets[at.GATE_DOWN], offsets[at.GATE_DOWN_BIAS], inner, logits)


@part(**OPTIONS)
def _hash_token(token_id, patterns, recent, read_keys, write_keys):
    """Write the keys that one row's token looks up and offers, and append it to the recent ones."""
    read_patterns, write_patterns, read_offsets = patterns
    num_patterns, num_recent = read_patterns.shape[0], recent.shape[0]
    stream = np.empty(num_recent + 1, np.int64)
    copy(recent, stream)
    stream[num_recent] = token_id
    for i in range(read_offsets.shape[0]):
        for n in range(num_patterns):
            read_keys[i * num_patterns + n] = hash_context(
                stream, num_recent - read_offsets[i], read_patterns, n
            )
    for n in range(write_keys.shape[0]):
        write_keys[n] = hash_context(stream, num_recent - 1, write_patterns, n)
    copy(stream[1:], recent)


@part(**OPTIONS)
def _mix_values(read_ids, log_strengths, weights, offsets, mixed):
    """Write the weighted mean of the values that one row found to mixed [D]."""
    num_reads, width = read_ids.shape[0], mixed.shape[0]
    eps = np.float64(np.finfo(weights.dtype).eps)
    shares = np.empty(num_reads, weights.dtype)
    value = np.empty(width, weights.dtype)
    largest, total = 0.0, 0.0
    fill(mixed, 0.0)
    for n in range(num_reads):
        shares[n] = weights[offsets[at.READ_SCORE] + n] + log_strengths[n]
        largest = max(largest, shares[n])
    for n in range(num_reads):
        shares[n] = math.exp(shares[n] - largest)
        total += shares[n]
    total += math.exp(-largest)
    for n in range(num_reads):
        if shares[n] == 0:
            continue
        copy(get_row(weights, offsets[at.EMBED], read_ids[n], width), value)
        scale_to_unit_square(value, eps)
        share = weights.dtype.type(shares[n] / total)
        for i in range(width):
            mixed[i] += share * value[i]


@part(**OPTIONS)
def retrieve_selective(
    token_ids, hidden, counters, weights, offsets, sizes, patterns, selective, context, read_ids,
    log_strengths,
):  # fmt: skip
    """Look contexts up and offer the last one: ``SelectiveMixer.look_up`` and ``weigh_reads``."""
    keys, values, codes, recent = selective
    batch, width = context.shape
    num_reads, num_writes = read_ids.shape[1], patterns[1].shape[0]
    logits = np.empty((batch, num_writes), weights.dtype)
    _weigh_writes(token_ids, hidden, weights, offsets, sizes, counters, width, logits)
    read_keys = np.empty((batch, 1, num_reads), np.int64)
    write_keys = np.empty((batch, 1, num_writes), np.int64)
    write_codes = np.empty((batch, 1, num_writes), np.int64)
    for b in range(batch):
        _hash_token(token_ids[b], patterns, recent[b], read_keys[b, 0], write_keys[b, 0])
        for n in range(num_writes):
            code = np.rint(logits[b, n] * CODES_PER_NAT)
            write_codes[b, 0, n] = np.int64(min(max(code, MIN_CODE), MAX_CODE))
    found = np.empty((batch, 1, num_reads), np.int64)
    found_codes = np.empty((batch, 1, num_reads), np.int64)
    found_values = np.empty((batch, 1, num_reads), np.int64)
    positions, lengths = np.empty(batch, np.int64), np.empty(batch, np.int64)
    for b in range(batch):
        positions[b], lengths[b] = counters[b, at.NUM_TOKENS], 1
        for n in range(num_reads):
            found[b, 0, n], found_codes[b, 0, n], found_values[b, 0, n] = -1, 0, 0
    scan_token(
        0, batch, read_keys, write_keys, token_ids.reshape(batch, 1), write_codes,
        positions, lengths, sizes[at.MARGIN], sizes[at.KEEP_FIRST] != 0, sizes[at.FADE_TOKENS],
        keys, values, codes, np.empty((batch, keys.shape[1]), np.int64),
        found, found_codes, found_values,
    )  # fmt: skip
    mixed = np.empty((batch, width), weights.dtype)
    for b in range(batch):
        for n in range(num_reads):
            log_strengths[b, n] = -np.inf
            if found[b, 0, n] >= 0:
                log_strengths[b, n] = log_sigmoid(found_codes[b, 0, n] / CODES_PER_NAT)
            read_ids[b, n] = found_values[b, 0, n]
        _mix_values(read_ids[b], log_strengths[b], weights, offsets, mixed[b])
    project(weights, offsets[at.VALUE], -1, mixed, context)
