"""One decode step in Numba: from a token id of every row to the logits, the state in place.

The steps are those of ``docs/forward.md`` with T = 1. What is projected from the normalised stream
is one product, and so is everything else that shares its input.

Numba compiles this module anew if it changes, not if a kernel that it calls changes in another file
(``ops``, ``layout``): touch this file with them.
"""
# mypy: allow-untyped-defs

import math

import numba
import numpy as np

from unimatrix.decoding.layout import (
    ASSOCIATIONS,
    AUTOMATON_SCORE,
    CONTEXT,
    CONTEXT_GATE,
    CONTEXT_PATH,
    DEPTH,
    DOWN,
    DOWN_BIAS,
    EMBED,
    FADE_TOKENS,
    FFN_NORM,
    FFN_NORM_BIAS,
    FINAL_NORM,
    FINAL_NORM_BIAS,
    FROM_HIDDEN,
    GATE_DOWN,
    GATE_DOWN_BIAS,
    GATE_UP,
    GATE_UP_BIAS,
    GATED,
    HAS_MATRIX,
    HEAD,
    HEAD_DIM,
    INNER_SIZE,
    INPUT,
    INPUT_BIAS,
    KEEP_FIRST,
    KEY,
    LAST_TOKEN_ID,
    LAYER_NORM,
    LENGTH_SCORE,
    MARGIN,
    MATCH_THRESHOLD,
    MATRIX_GATE,
    MIXES_RULES,
    MIXTURE,
    MIXTURE_BIAS,
    MODULATION,
    NO_CONTEXT,
    NORM,
    NORM_BIAS,
    NORM_EPS,
    NORM_GUARD,
    NORMALIZED_KEYS,
    NUM_DEPTH_STEPS,
    NUM_HEADS,
    NUM_PROJECTED,
    NUM_READS,
    NUM_SLOT_SCORES,
    NUM_TOKENS,
    OUTPUT,
    PAD_ID,
    POINTER_GATE,
    POINTER_VOTES,
    POSITIONS,
    PREVIOUS_TOKEN,
    QKVD,
    QUERY,
    READ_GATE,
    READ_SCORE,
    RETENTION,
    RULES,
    SELECTIVE,
    SLOTS,
    STRENGTH_FLOOR,
    UP,
    UP_BIAS,
    VALUE,
    WRITE_GATE,
    WRITE_GATE_BIAS,
)
from unimatrix.ops.matrix_state.native_step import advance_matrix
from unimatrix.ops.selective_slots.native_step import hash_context, scan_token
from unimatrix.ops.selective_slots.state import CODES_PER_NAT, MAX_CODE, MIN_CODE
from unimatrix.ops.slots.native_step import advance_slots

_OPTIONS = {"nogil": True, "error_model": "numpy", "fastmath": {"reassoc", "contract", "nsz"}}
_NUM_RULES = 3
_MIN_NORM = 1e-12
# As in ``nn.matrix_mixer`` and ``nn.pointer_mixture``.
_READOUT_EPS = 1e-6


@numba.njit(cache=True, **_OPTIONS)
def _sigmoid(number):
    return 1.0 / (1.0 + math.exp(-number))


@numba.njit(cache=True, **_OPTIONS)
def _log_sigmoid(number):
    if number > 0:
        return -math.log1p(math.exp(-number))
    return number - math.log1p(math.exp(number))


@numba.njit(cache=True, **_OPTIONS)
def _gelu(number):
    return 0.5 * number * (1.0 + math.erf(number * math.sqrt(0.5)))


@numba.njit(cache=True, **_OPTIONS)
def _project(weights, start, bias, x, y):
    """Write x [B, inputs] times a matrix [inputs, outputs], plus a bias, to y [B, outputs]."""
    num_inputs, num_outputs = x.shape[1], y.shape[1]
    matrix = weights[start : start + num_inputs * num_outputs].reshape(num_inputs, num_outputs)
    for b in range(x.shape[0]):
        if bias >= 0:
            y[b] = weights[bias : bias + num_outputs]
        else:
            y[b] = 0.0
    i = 0
    # Eight rows at a time: what is summed is loaded and stored once for all of them.
    while i + 8 <= num_inputs:
        m0, m1, m2, m3 = matrix[i], matrix[i + 1], matrix[i + 2], matrix[i + 3]
        m4, m5, m6, m7 = matrix[i + 4], matrix[i + 5], matrix[i + 6], matrix[i + 7]
        for b in range(x.shape[0]):
            x0, x1, x2, x3 = x[b, i], x[b, i + 1], x[b, i + 2], x[b, i + 3]
            x4, x5, x6, x7 = x[b, i + 4], x[b, i + 5], x[b, i + 6], x[b, i + 7]
            total = y[b]
            for o in range(num_outputs):
                total[o] += (
                    x0 * m0[o] + x1 * m1[o] + x2 * m2[o] + x3 * m3[o]
                    + x4 * m4[o] + x5 * m5[o] + x6 * m6[o] + x7 * m7[o]
                )  # fmt: skip
        i += 8
    while i < num_inputs:
        m0 = matrix[i]
        for b in range(x.shape[0]):
            x0 = x[b, i]
            total = y[b]
            for o in range(num_outputs):
                total[o] += x0 * m0[o]
        i += 1


@numba.njit(cache=True, **_OPTIONS)
def _get_row(weights, start, row, width):
    """Return row ``row`` of a table [rows, width]."""
    first = start + row * width
    return weights[first : first + width]


@numba.njit(cache=True, **_OPTIONS)
def _scale_to_unit_square(numbers, eps):
    """Divide [n] by the root of its mean square, in place."""
    total = 0.0
    for number in numbers:
        total += number * number
    scale = numbers.dtype.type(1.0 / math.sqrt(total / numbers.shape[0] + eps))
    for i in range(numbers.shape[0]):
        numbers[i] *= scale


@numba.njit(cache=True, **_OPTIONS)
def _normalize(x, weights, start, bias, sizes, eps, h):
    """Write the norm of x [B, D] to h [B, D]: ``nn.norm``."""
    width = x.shape[1]
    kind = h.dtype.type
    scale = weights[start : start + width]
    for b in range(x.shape[0]):
        mean, total = 0.0, 0.0
        if sizes[LAYER_NORM]:
            for number in x[b]:
                mean += number
            mean /= width
        for number in x[b]:
            total += (number - mean) * (number - mean)
        factor, middle = kind(1.0 / math.sqrt(total / width + eps)), kind(mean)
        for i in range(width):
            h[b, i] = (x[b, i] - middle) * factor * scale[i]
        if bias >= 0:
            for i in range(width):
                h[b, i] += weights[bias + i]


@numba.njit(cache=True, **_OPTIONS)
def _add_gated(gate, context, mixed):
    """Add sigmoid(gate) * context to mixed, [D] each."""
    for i in range(mixed.shape[0]):
        mixed[i] += context[i] * mixed.dtype.type(_sigmoid(gate[i]))


@numba.njit(cache=True, **_OPTIONS)
def _bound(numbers, size, normalized):
    """Make unit vectors of every ``size`` numbers, or take the tanh of each, in place."""
    if not normalized:
        for i in range(numbers.shape[0]):
            numbers[i] = math.tanh(numbers[i])
        return
    for first in range(0, numbers.shape[0], size):
        vector = numbers[first : first + size]
        total = 0.0
        for number in vector:
            total += number * number
        scale = numbers.dtype.type(1.0 / max(math.sqrt(total), _MIN_NORM))
        for i in range(size):
            vector[i] *= scale


@numba.njit(cache=True, **_OPTIONS)
def _softmax_rules(rules):
    """Turn the scores of each head's rules into weights, in place."""
    for first in range(0, rules.shape[0], _NUM_RULES):
        scores = rules[first : first + _NUM_RULES]
        largest = scores.max()
        for i in range(_NUM_RULES):
            scores[i] = math.exp(scores[i] - largest)
        scores /= scores.sum()


@numba.njit(cache=True, **_OPTIONS)
def _mix_matrix(projected, sizes, parts, S, y):
    """Advance the matrix states of one row [H, N, N] and write the readouts to y [H N]."""
    num_heads, size = sizes[NUM_HEADS], sizes[HEAD_DIM]
    inner = num_heads * size
    num_vectors = 4 if sizes[MIXES_RULES] else 3
    first = parts[QKVD]
    _bound(projected[first : first + num_vectors * inner], size, sizes[NORMALIZED_KEYS] != 0)
    rules = projected[:0]
    if sizes[MIXES_RULES]:
        rules = projected[parts[RULES] : parts[RULES] + num_heads * _NUM_RULES]
        _softmax_rules(rules)
    for h in range(num_heads):
        q = projected[first + h * size : first + (h + 1) * size]
        k = projected[first + inner + h * size : first + inner + (h + 1) * size]
        v = projected[first + 2 * inner + h * size : first + 2 * inner + (h + 1) * size]
        d = q
        if sizes[MIXES_RULES]:
            d = projected[first + 3 * inner + h * size : first + 3 * inner + (h + 1) * size]
        readout = y[h * size : (h + 1) * size]
        advance_matrix(
            S[h], q, k, v, d, projected[parts[RETENTION] + h],
            rules[h * _NUM_RULES : (h + 1) * _NUM_RULES], sizes[NORM_GUARD] != 0, readout,
        )  # fmt: skip
        if sizes[NORMALIZED_KEYS]:
            _scale_to_unit_square(readout, _READOUT_EPS)


@numba.njit(cache=True, **_OPTIONS)
def _retrieve_slots(
    source, token_ids, counters, weights, offsets, numbers, slots, group, context, read_ids, votes
):
    """Read and write the slots with source features [B, D]: ``SlotMixer.retrieve``."""
    keys, values, strengths, previous, units, ranks, ages, held_ids = slots
    batch, width = source.shape
    queries, new_keys, new_values = source, previous[group].copy(), source
    if offsets[QUERY] >= 0:
        queries = np.empty((batch, keys.shape[3]), source.dtype)
        _project(weights, offsets[QUERY], -1, source, queries)
        new_keys = np.empty((batch, keys.shape[3]), source.dtype)
        _project(weights, offsets[KEY], -1, previous[group], new_keys)
    if offsets[VALUE] >= 0:
        new_values = np.empty((batch, width), source.dtype)
        _project(weights, offsets[VALUE], -1, source, new_values)
    new_strengths = np.ones((batch, 1), source.dtype)
    if offsets[WRITE_GATE] >= 0:
        pair = np.empty((batch, 2 * width), source.dtype)
        pair[:, :width] = previous[group]
        pair[:, width:] = source
        _project(weights, offsets[WRITE_GATE], offsets[WRITE_GATE_BIAS], pair, new_strengths)
        for b in range(batch):
            new_strengths[b, 0] = _sigmoid(new_strengths[b, 0])
    for b in range(batch):
        advance_slots(
            b, queries, new_keys, new_values, new_strengths[:, 0].copy(), token_ids[b],
            counters[b, NUM_TOKENS] > 0, numbers[MATCH_THRESHOLD], numbers[STRENGTH_FLOOR],
            keys[group, b], values[group, b], strengths[group, b], units[group, b],
            ranks[group, b], ages[group, b], held_ids[group, b],
            context[b], read_ids[b], votes[b],
        )  # fmt: skip
    previous[group] = source


@numba.njit(cache=True, **_OPTIONS)
def _weigh_writes(token_ids, hidden, weights, offsets, sizes, counters, width, logits):
    """Write the gate's logits [B, N] of this token's writes."""
    batch = token_ids.shape[0]
    inputs = np.zeros((batch, (3 if sizes[FROM_HIDDEN] else 2) * width), weights.dtype)
    # What ``rms_norm`` adds where nothing is said: the machine's epsilon.
    eps = np.float64(np.finfo(weights.dtype).eps)
    for b in range(batch):
        before = counters[b, LAST_TOKEN_ID]
        if before >= 0:
            inputs[b, :width] = _get_row(weights, offsets[EMBED], before, width)
        inputs[b, width : 2 * width] = _get_row(weights, offsets[EMBED], token_ids[b], width)
        if sizes[FROM_HIDDEN]:
            inputs[b, 2 * width :] = hidden[b]
        for first in range(0, inputs.shape[1], width):
            _scale_to_unit_square(inputs[b, first : first + width], eps)
    inner = np.empty((batch, width // 2), weights.dtype)
    _project(weights, offsets[GATE_UP], offsets[GATE_UP_BIAS], inputs, inner)
    for b in range(batch):
        for i in range(inner.shape[1]):
            inner[b, i] = _gelu(inner[b, i])
    _project(weights, offsets[GATE_DOWN], offsets[GATE_DOWN_BIAS], inner, logits)


@numba.njit(cache=True, **_OPTIONS)
def _retrieve_selective(
    token_ids, hidden, counters, weights, offsets, sizes, patterns, selective, context, read_ids,
    log_strengths,
):  # fmt: skip
    """Look contexts up and offer the last one: ``SelectiveMixer.retrieve``."""
    read_patterns, write_patterns, read_offsets = patterns
    keys, values, codes, recent = selective
    batch, width = context.shape
    num_patterns, num_writes = read_patterns.shape[0], write_patterns.shape[0]
    num_reads, num_recent = read_ids.shape[1], recent.shape[1]
    logits = np.empty((batch, num_writes), weights.dtype)
    _weigh_writes(token_ids, hidden, weights, offsets, sizes, counters, width, logits)
    read_keys = np.empty((batch, 1, num_reads), np.int64)
    write_keys = np.empty((batch, 1, num_writes), np.int64)
    write_codes = np.empty((batch, 1, num_writes), np.int64)
    stream = np.empty(num_recent + 1, np.int64)
    for b in range(batch):
        stream[:num_recent] = recent[b]
        stream[num_recent] = token_ids[b]
        for i in range(read_offsets.shape[0]):
            for n in range(num_patterns):
                read_keys[b, 0, i * num_patterns + n] = hash_context(
                    stream, num_recent - read_offsets[i], read_patterns, n
                )
        for n in range(num_writes):
            write_keys[b, 0, n] = hash_context(stream, num_recent - 1, write_patterns, n)
            code = np.rint(logits[b, n] * CODES_PER_NAT)
            write_codes[b, 0, n] = np.int64(min(max(code, MIN_CODE), MAX_CODE))
        recent[b] = stream[1:]
    found = np.full((batch, 1, num_reads), -1, np.int64)
    found_codes = np.zeros((batch, 1, num_reads), np.int64)
    found_values = np.zeros((batch, 1, num_reads), np.int64)
    scan_token(
        0, batch, read_keys, write_keys, token_ids.reshape(batch, 1), write_codes,
        counters[:, NUM_TOKENS].copy(), np.ones(batch, np.int64), sizes[MARGIN],
        sizes[KEEP_FIRST] != 0, sizes[FADE_TOKENS], keys, values, codes, np.empty_like(keys),
        found, found_codes, found_values,
    )  # fmt: skip
    eps = np.float64(np.finfo(weights.dtype).eps)
    mixed = np.zeros((batch, width), weights.dtype)
    shares = np.empty(num_reads, weights.dtype)
    value = np.empty(width, weights.dtype)
    for b in range(batch):
        largest, total = 0.0, 0.0
        for n in range(num_reads):
            log_strengths[b, n] = -np.inf
            if found[b, 0, n] >= 0:
                log_strengths[b, n] = _log_sigmoid(found_codes[b, 0, n] / CODES_PER_NAT)
            read_ids[b, n] = found_values[b, 0, n]
            shares[n] = weights[offsets[READ_SCORE] + n] + log_strengths[b, n]
            largest = max(largest, shares[n])
        for n in range(num_reads):
            shares[n] = math.exp(shares[n] - largest)
            total += shares[n]
        total += math.exp(-largest)
        for n in range(num_reads):
            if shares[n] == 0:
                continue
            value[:] = _get_row(weights, offsets[EMBED], read_ids[b, n], width)
            _scale_to_unit_square(value, eps)
            share = weights.dtype.type(shares[n] / total)
            for i in range(width):
                mixed[b, i] += share * value[i]
    _project(weights, offsets[VALUE], -1, mixed, context)


@numba.njit(cache=True, **_OPTIONS)
def _feed_forward(h, weights, offsets, sizes, x):
    """Add the feed-forward network of h [B, D] to the stream x [B, D]."""
    batch, size = h.shape[0], sizes[INNER_SIZE]
    inner = np.empty((batch, size), h.dtype)
    if sizes[GATED]:
        both = np.empty((batch, 2 * size), h.dtype)
        _project(weights, offsets[UP], -1, h, both)
        for b in range(batch):
            for i in range(size):
                gate = both[b, i]
                inner[b, i] = gate * _sigmoid(gate) * both[b, size + i]
    else:
        _project(weights, offsets[UP], offsets[UP_BIAS], h, inner)
        for b in range(batch):
            for i in range(size):
                inner[b, i] = _gelu(inner[b, i])
    output = np.empty_like(x)
    _project(weights, offsets[DOWN], offsets[DOWN_BIAS], inner, output)
    x += output


@numba.njit(cache=True, **_OPTIONS)
def _add_log(left, right):
    """Return ln(exp(left) + exp(right))."""
    largest = max(left, right)
    if largest == -np.inf:
        return largest
    return largest + math.log1p(math.exp(min(left, right) - largest))


@numba.njit(cache=True, **_OPTIONS)
def _mix_logits(h, logits, read_ids, log_strengths, match, weights, offsets, sizes):
    """Turn logits [B, V] into ln of the mixture's probabilities: ``nn.pointer_mixture``."""
    predicted_ids, match_lengths = match
    batch, width = h.shape
    num_reads = sizes[NUM_SLOT_SCORES]
    num_scores = num_reads + sizes[AUTOMATON_SCORE]
    scores = np.empty((batch, num_scores), h.dtype)
    _project(weights, offsets[MIXTURE], offsets[MIXTURE_BIAS], h, scores)
    ids = np.empty(num_scores, np.int64)
    for b in range(batch):
        ids[:num_reads] = read_ids[b, :num_reads]
        for n in range(num_reads):
            scores[b, n] += log_strengths[b, n]
        if sizes[AUTOMATON_SCORE]:
            bucket, length = 0, 2 * match_lengths[b, 0] - 1
            while length > 1 and bucket < 9:
                length >>= 1
                bucket += 1
            scores[b, num_reads] += weights[offsets[LENGTH_SCORE] + bucket]
            ids[num_reads] = predicted_ids[b, 0]
            if predicted_ids[b, 0] < 0:
                scores[b, num_reads] = -np.inf
        sharing = 0.0  # ln of the sum over the vocabulary, whose score is 0, and the others
        for n in range(num_scores):
            sharing = _add_log(sharing, np.float64(scores[b, n]))
        largest = np.float64(logits[b].max())
        total = 0.0
        for number in logits[b]:
            total += math.exp(number - largest)
        shift = weights.dtype.type(largest + math.log(total) + sharing)
        for i in range(logits.shape[1]):
            logits[b, i] -= shift
        for n in range(num_scores):
            if scores[b, n] > -np.inf:
                token_id = ids[n]
                logits[b, token_id] = _add_log(
                    np.float64(logits[b, token_id]), np.float64(scores[b, n]) - sharing
                )


@numba.njit(cache=True, **_OPTIONS)
def _embed(token_ids, weights, offsets, counters, source, x):
    """Write the token features and the start of the stream, [B, D] each."""
    width = x.shape[1]
    for b in range(x.shape[0]):
        source[b] = _get_row(weights, offsets[EMBED], token_ids[b], width)
        x[b] = source[b]
        if offsets[POSITIONS] >= 0:
            x[b] += _get_row(weights, offsets[POSITIONS], counters[b, NUM_TOKENS], width)


@numba.njit(cache=True, **_OPTIONS)
def _find_context(weights, offsets, sizes, counters, match, context):
    """Write the residual context [B, D]: ``nn.residual_context``."""
    for b in range(context.shape[0]):
        followed = match[0][b, 0]
        if sizes[CONTEXT_PATH] == PREVIOUS_TOKEN:
            followed = counters[b, LAST_TOKEN_ID]
            if followed < 0:
                followed = sizes[PAD_ID]
        if followed >= 0:
            context[b] = _get_row(weights, offsets[CONTEXT], followed, context.shape[1])


@numba.njit(cache=True, **_OPTIONS)
def advance(token_ids, plan, carried, match, logits):
    """Read one token of every row.

    Args:
        token_ids: [B] int64, in 0..V-1.
        plan: weights, and where they lie (``plan.py``).
        carried: what the rows carry, changed in place (``state.py``).
        match: the automaton's predicted ids and match lengths after the token, [B, 1] each.
        logits: [B, V], written here.
    """
    weights, offsets, sizes, parts, numbers, patterns = plan
    matrix_states, slots, selective, counters = carried
    batch, width = token_ids.shape[0], slots[3].shape[2]
    source, x, h, mixed, readout = (
        np.empty((batch, width), weights.dtype),
        np.empty((batch, width), weights.dtype),
        np.empty((batch, width), weights.dtype),
        np.empty((batch, width), weights.dtype),
        np.empty((batch, width), weights.dtype),
    )
    _embed(token_ids, weights, offsets, counters, source, x)
    followed = np.zeros((batch, width), weights.dtype)
    if sizes[CONTEXT_PATH] != NO_CONTEXT:
        _find_context(weights, offsets, sizes, counters, match, followed)
    read_context = np.zeros((batch, width), weights.dtype)
    num_reads = sizes[NUM_READS]
    has_slots = sizes[ASSOCIATIONS] == SLOTS
    read_ids = np.zeros((batch, num_reads), np.int64)
    votes = np.zeros((batch, num_reads), weights.dtype)
    from_hidden = sizes[FROM_HIDDEN] != 0
    if has_slots and not from_hidden:
        _retrieve_slots(
            source, token_ids, counters, weights, offsets, numbers, slots, 0, read_context,
            read_ids, votes,
        )  # fmt: skip
    inner = sizes[NUM_HEADS] * sizes[HEAD_DIM]
    projected = np.empty((batch, sizes[NUM_PROJECTED]), weights.dtype)
    y = np.empty((batch, inner), weights.dtype)
    num_depth_steps = sizes[NUM_DEPTH_STEPS]
    has_read = has_slots
    for depth_step in range(num_depth_steps):
        if sizes[ASSOCIATIONS] == SELECTIVE and depth_step == sizes[FROM_HIDDEN]:
            _retrieve_selective(
                token_ids, x, counters, weights, offsets, sizes, patterns, selective, read_context,
                read_ids, votes,
            )  # fmt: skip
            has_read = True
        if offsets[DEPTH] >= 0:
            for b in range(batch):
                x[b] += _get_row(weights, offsets[DEPTH], depth_step, width)
        _normalize(x, weights, offsets[NORM], offsets[NORM_BIAS], sizes, numbers[NORM_EPS], h)
        _project(weights, offsets[INPUT], offsets[INPUT_BIAS], h, projected)
        mixed[:] = 0.0
        if sizes[HAS_MATRIX]:
            for b in range(batch):
                _mix_matrix(projected[b], sizes, parts, matrix_states[depth_step, b], y[b])
            _project(weights, offsets[OUTPUT], -1, y, readout)
        if has_slots and from_hidden:
            _retrieve_slots(
                h, token_ids, counters, weights, offsets, numbers, slots, depth_step, read_context,
                read_ids, votes,
            )  # fmt: skip
        for b in range(batch):
            if sizes[HAS_MATRIX]:
                _add_gated(projected[b, parts[MATRIX_GATE] :], readout[b], mixed[b])
            if has_read:
                _add_gated(projected[b, parts[READ_GATE] :], read_context[b], mixed[b])
            if sizes[CONTEXT_PATH] != NO_CONTEXT:
                _add_gated(projected[b, parts[CONTEXT_GATE] :], followed[b], mixed[b])
        x += mixed
        eps = numbers[NORM_EPS]
        _normalize(x, weights, offsets[FFN_NORM], offsets[FFN_NORM_BIAS], sizes, eps, h)
        _feed_forward(h, weights, offsets, sizes, x)
        if offsets[MODULATION] >= 0:
            for b in range(batch):
                x[b] *= _get_row(weights, offsets[MODULATION], token_ids[b], width)
    eps = numbers[NORM_EPS]
    _normalize(x, weights, offsets[FINAL_NORM], offsets[FINAL_NORM_BIAS], sizes, eps, h)
    _project(weights, offsets[HEAD], -1, h, logits)
    if offsets[MIXTURE] >= 0:
        _mix_logits(h, logits, read_ids, votes, match, weights, offsets, sizes)
    for b in range(batch):
        if sizes[POINTER_VOTES]:
            gate = weights.dtype.type(_sigmoid(projected[b, parts[POINTER_GATE]]))
            for n in range(num_reads):
                logits[b, read_ids[b, n]] += gate * votes[b, n]
        counters[b, NUM_TOKENS] += 1
        counters[b, LAST_TOKEN_ID] = token_ids[b]
