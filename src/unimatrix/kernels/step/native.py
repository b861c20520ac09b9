"""One decode step in Numba: from a token id of every row to the logits, the state in place.

The steps are those of ``docs/forward.md`` with T = 1. What is projected from the normalised stream
is one product, and so is everything else that shares its input.
"""
# mypy: allow-untyped-defs

import numpy as np

from unimatrix.kernels.step import layout as at
from unimatrix.kernels.step.indexed_native import mix_heads, read_places, sum_heads
from unimatrix.kernels.step.selective_native import retrieve_selective
from unimatrix.kernels.step.vectors_native import (
    NUM_RULES,
    OPTIONS,
    add,
    add_gated,
    add_log,
    bound,
    copy,
    fill,
    gelu,
    get_row,
    log_sum,
    multiply_silu,
    normalize,
    project,
    scale_to_unit_square,
    sigmoid,
    softmax_rules,
)
from unimatrix.ops.matrix_state.native_step import advance_delta, advance_matrix
from unimatrix.ops.matrix_state.reference import READOUT_EPS
from unimatrix.ops.numba.compile import kernel, part
from unimatrix.ops.numba.lanes import pointer
from unimatrix.ops.slots.native_step import advance_slots
from unimatrix.ops.text_hash import MULTIPLIER


@part(**OPTIONS)
def _convolve(h, weights, start, recent, source):
    """Mix the streams of the last tokens: ``nn.short_convolution``.

    h [B, D] is what comes in, recent [B, K - 1, D] what came before, source [B, D] what comes out.
    """
    batch, width = h.shape
    num_recent = recent.shape[1]
    for b in range(batch):
        row = get_row(weights, start, num_recent, width)
        for i in range(width):
            source[b, i] = h[b, i] * row[i]
        for n in range(num_recent):
            row = get_row(weights, start, n, width)
            for i in range(width):
                source[b, i] += recent[b, n, i] * row[i]
        for n in range(num_recent - 1):
            copy(recent[b, n + 1], recent[b, n])
        copy(h[b], recent[b, num_recent - 1])


@part(**OPTIONS)
def _mix_matrix(projected, vectors, sizes, parts, S, y):
    """Advance the matrix states of one row [H, N, N] and write the readouts to y [H N]."""
    num_heads, size = sizes[at.NUM_HEADS], sizes[at.HEAD_DIM]
    inner = num_heads * size
    mixes_rules, num_vectors = sizes[at.MIXES_RULES] != 0, 4 if sizes[at.MIXES_RULES] else 3
    for i in range(num_vectors):
        if i != 1 or not sizes[at.USES_DELTA]:  # the payload of the delta rule has no bound
            bound(vectors[i * inner : (i + 1) * inner], size, sizes[at.NORMALIZED_KEYS] != 0)
    first_rule = parts[at.RULES] if mixes_rules else 0
    if mixes_rules:
        softmax_rules(projected[first_rule : first_rule + num_heads * NUM_RULES])
    for h in range(num_heads):
        log_odds = projected[parts[at.RETENTION] + h]
        if sizes[at.USES_DELTA]:
            q = vectors[h * size : (h + 1) * size]
            k = vectors[inner + h * size : inner + (h + 1) * size]
            v = vectors[2 * inner + h * size : 2 * inner + (h + 1) * size]
            strength = sigmoid(projected[parts[at.WRITE_STRENGTH] + h])
            advance_delta(S[h], q, k, v, log_odds, strength, y[h * size : (h + 1) * size])
            continue
        # 1 - rho without cancellation is the logistic function of minus the log odds.
        rho, write = y.dtype.type(sigmoid(log_odds)), y.dtype.type(sigmoid(-log_odds))
        d = (3 * inner if mixes_rules else 0) + h * size
        advance_matrix(
            size, pointer(S, h * size * size), pointer(vectors, h * size),
            pointer(vectors, inner + h * size), pointer(vectors, 2 * inner + h * size),
            pointer(vectors, d), rho, write, pointer(projected, first_rule + h * NUM_RULES),
            mixes_rules, sizes[at.NORM_GUARD] != 0, pointer(y, h * size),
        )  # fmt: skip
    if sizes[at.NORMALIZED_KEYS]:
        for h in range(num_heads):
            scale_to_unit_square(y[h * size : (h + 1) * size], READOUT_EPS)


@part(**OPTIONS)
def _retrieve_slots(
    source, token_ids, counters, weights, offsets, numbers, slots, group, context, read_ids, votes
):
    """Read and write the slots with source features [B, D]: ``SlotMixer.forward``."""
    keys, values, strengths, previous, units, ranks, ages, held_ids = slots
    batch, width = source.shape
    queries, new_keys, new_values = source, previous[group], source
    if offsets[at.QUERY] >= 0:
        queries = np.empty((batch, keys.shape[3]), source.dtype)
        project(weights, offsets[at.QUERY], -1, source, queries)
        new_keys = np.empty((batch, keys.shape[3]), source.dtype)
        project(weights, offsets[at.KEY], -1, previous[group], new_keys)
    if offsets[at.VALUE] >= 0:
        new_values = np.empty((batch, width), source.dtype)
        project(weights, offsets[at.VALUE], -1, source, new_values)
    new_strengths = np.empty((batch, 1), source.dtype)
    for b in range(batch):
        new_strengths[b, 0] = 1.0
    if offsets[at.WRITE_GATE] >= 0:
        pair = np.empty((batch, 2 * width), source.dtype)
        for b in range(batch):
            copy(previous[group, b], pair[b, :width])
            copy(source[b], pair[b, width:])
        project(weights, offsets[at.WRITE_GATE], offsets[at.WRITE_GATE_BIAS], pair, new_strengths)
        for b in range(batch):
            new_strengths[b, 0] = sigmoid(new_strengths[b, 0])
    for b in range(batch):
        advance_slots(
            b, queries, new_keys, new_values, new_strengths[b, 0], token_ids[b],
            counters[b, at.NUM_TOKENS] > 0, numbers[at.MATCH_THRESHOLD], numbers[at.STRENGTH_FLOOR],
            keys[group, b], values[group, b], strengths[group, b], units[group, b],
            ranks[group, b], ages[group, b], held_ids[group, b],
            context[b], read_ids[b], votes[b],
        )  # fmt: skip
    for b in range(batch):
        copy(source[b], previous[group, b])


@part(**OPTIONS)
def _feed_forward(h, weights, offsets, sizes, x):
    """Add the feed-forward network of h [B, D] to the stream x [B, D]."""
    batch, size = h.shape[0], sizes[at.INNER_SIZE]
    inner = np.empty((batch, size), h.dtype)
    if sizes[at.GATED]:
        both = np.empty((batch, 2 * size), h.dtype)
        project(weights, offsets[at.UP], -1, h, both)
        for b in range(batch):
            multiply_silu(both[b, :size], both[b, size:], inner[b])
    else:
        project(weights, offsets[at.UP], offsets[at.UP_BIAS], h, inner)
        for b in range(batch):
            for i in range(size):
                inner[b, i] = gelu(inner[b, i])
    output = np.empty_like(x)
    project(weights, offsets[at.DOWN], offsets[at.DOWN_BIAS], inner, output)
    for b in range(batch):
        add(output[b], x[b])


@part(**OPTIONS)
def _mix_logits(h, logits, read_ids, log_strengths, match, shares, totals, weights, offsets, sizes):
    """Turn logits [B, V] into ln of the mixture's probabilities: ``nn.pointer_mixture``."""
    batch = h.shape[0]
    num_reads = sizes[at.NUM_SLOT_SCORES]
    num_scores = num_reads + sizes[at.AUTOMATON_SCORE]
    scores = np.empty((batch, num_scores + sizes[at.NUM_HEAD_SCORES]), h.dtype)
    project(weights, offsets[at.MIXTURE], offsets[at.MIXTURE_BIAS], h, scores)
    ids = np.empty(num_scores, np.int64)
    for b in range(batch):
        for n in range(num_reads):
            ids[n] = read_ids[b, n]
            scores[b, n] += log_strengths[b, n]
        if match is not None and sizes[at.AUTOMATON_SCORE]:
            bucket, length = 0, 2 * match[1][b, 0] - 1
            while length > 1 and bucket < sizes[at.NUM_LENGTH_BUCKETS] - 1:
                length >>= 1
                bucket += 1
            scores[b, num_reads] += weights[offsets[at.LENGTH_SCORE] + bucket]
            ids[num_reads] = match[0][b, 0]
            if ids[num_reads] < 0:
                scores[b, num_reads] = -np.inf
        sharing = 0.0  # ln of the sum over the vocabulary, whose score is 0, and the others
        for n in range(num_scores):
            sharing = add_log(sharing, np.float64(scores[b, n]))
        if shares is not None and sizes[at.NUM_HEAD_SCORES]:
            sharing = sum_heads(scores[b, num_scores:], totals[b], sharing)
        shift = weights.dtype.type(log_sum(logits[b]) + sharing)
        for i in range(logits.shape[1]):
            logits[b, i] -= shift
        for n in range(num_scores):
            if scores[b, n] > -np.inf:
                token_id = ids[n]
                logits[b, token_id] = add_log(
                    np.float64(logits[b, token_id]), np.float64(scores[b, n]) - sharing
                )
        if shares is not None and sizes[at.NUM_HEAD_SCORES]:
            mix_heads(scores[b, num_scores:], shares[b], sharing, logits[b])


@part(**OPTIONS)
def _embed(token_ids, weights, offsets, counters, source, x):
    """Write the token features and the start of the stream, [B, D] each."""
    width = x.shape[1]
    for b in range(x.shape[0]):
        copy(get_row(weights, offsets[at.EMBED], token_ids[b], width), source[b])
        copy(source[b], x[b])
        if offsets[at.POSITIONS] >= 0:
            add(get_row(weights, offsets[at.POSITIONS], counters[b, at.NUM_TOKENS], width), x[b])


@kernel(**OPTIONS)
def advance(
    token_ids, packed, matrix_states, recents, slots, selective, counters, match, indexed, logits
):  # fmt: skip
    """Read one token of every row.

    What a model lacks is ``None``, and its part of the step is not compiled.

    Args:
        token_ids: [B] int64, in 0..V-1.
        packed: weights, and where they lie (``weights.py``).
        matrix_states: as in ``state.StepState`` and changed in place, like the next four.
        recents: or ``None``.
        slots: or ``None``.
        selective: or ``None``.
        counters: of every row.
        match: the automaton's predicted ids and match lengths after the token, [B, 1] each, or
            ``None``.
        indexed: tokens and places of the index, the token among them, its keys, and which of them
            are held; or ``None``.
        logits: [B, V], written here.
    """
    weights, offsets, sizes, parts, numbers, patterns = packed
    batch, width = token_ids.shape[0], sizes[at.HIDDEN_SIZE]
    source, x, h, mixed, readout, followed, read_context = (
        np.empty((batch, width), weights.dtype),
        np.empty((batch, width), weights.dtype),
        np.empty((batch, width), weights.dtype),
        np.empty((batch, width), weights.dtype),
        np.empty((batch, width), weights.dtype),
        np.empty((batch, width), weights.dtype),
        np.empty((batch, width), weights.dtype),
    )
    _embed(token_ids, weights, offsets, counters, source, x)
    if sizes[at.CONTEXT_PATH] == at.PREVIOUS_TOKEN:
        for b in range(batch):
            before = counters[b, at.LAST_TOKEN_ID]
            before = sizes[at.PAD_ID] if before < 0 else before
            copy(get_row(weights, offsets[at.CONTEXT], before, width), followed[b])
    if match is not None:
        for b in range(batch):
            fill(followed[b], 0.0)
            if match[0][b, 0] >= 0:
                copy(get_row(weights, offsets[at.CONTEXT], match[0][b, 0], width), followed[b])
    num_reads = sizes[at.NUM_READS]
    read_ids = np.empty((batch, num_reads), np.int64)
    votes = np.empty((batch, num_reads), weights.dtype)
    from_hidden = sizes[at.FROM_HIDDEN] != 0
    centered, eps = sizes[at.LAYER_NORM] != 0, numbers[at.NORM_EPS]
    if slots is not None and not from_hidden:
        _retrieve_slots(
            source, token_ids, counters, weights, offsets, numbers, slots, 0, read_context,
            read_ids, votes,
        )  # fmt: skip
    inner = sizes[at.NUM_HEADS] * sizes[at.HEAD_DIM]
    projected = np.empty((batch, sizes[at.NUM_PROJECTED]), weights.dtype)
    num_vectors = 4 if sizes[at.MIXES_RULES] else 3
    vectors = np.empty((batch, num_vectors * inner), weights.dtype)
    y = np.empty((batch, inner), weights.dtype)
    num_depth_steps = sizes[at.NUM_DEPTH_STEPS]
    has_read = sizes[at.ASSOCIATIONS] == at.SLOTS
    shares, totals = None, None
    if indexed is not None:
        shares = np.empty((batch, sizes[at.INDEX_HEADS], logits.shape[1]), weights.dtype)
        totals = np.empty((batch, sizes[at.INDEX_HEADS]), weights.dtype)
    for depth_step in range(num_depth_steps):
        if selective is not None and depth_step == sizes[at.FROM_HIDDEN]:
            retrieve_selective(
                token_ids, x, counters, weights, offsets, sizes, patterns, selective,
                read_context, read_ids, votes,
            )  # fmt: skip
            has_read = True
        if indexed is not None and depth_step == sizes[at.INDEX_READS_AT]:
            read_places(x, counters, weights, offsets, sizes, indexed, shares, totals, read_context)
            has_read = True
        if offsets[at.DEPTH] >= 0:
            for b in range(batch):
                add(get_row(weights, offsets[at.DEPTH], depth_step, width), x[b])
        normalize(x, weights, offsets[at.NORM], offsets[at.NORM_BIAS], centered, eps, h)
        project(weights, offsets[at.INPUT], offsets[at.INPUT_BIAS], h, projected)
        if sizes[at.HAS_MATRIX]:
            if recents is not None:
                _convolve(h, weights, offsets[at.CONV], recents[depth_step], readout)
                project(weights, offsets[at.VECTORS], -1, readout, vectors)
            else:
                for b in range(batch):
                    copy(projected[b, parts[at.QKVD] :], vectors[b])
            for b in range(batch):
                _mix_matrix(
                    projected[b], vectors[b], sizes, parts, matrix_states[depth_step, b], y[b]
                )
            project(weights, offsets[at.OUTPUT], -1, y, readout)
        if slots is not None and from_hidden:
            _retrieve_slots(
                h, token_ids, counters, weights, offsets, numbers, slots, depth_step,
                read_context, read_ids, votes,
            )  # fmt: skip
        for b in range(batch):
            fill(mixed[b], 0.0)
            if sizes[at.HAS_MATRIX]:
                add_gated(projected[b, parts[at.MATRIX_GATE] :], readout[b], mixed[b])
            if has_read:
                add_gated(projected[b, parts[at.READ_GATE] :], read_context[b], mixed[b])
            if sizes[at.CONTEXT_PATH] != at.NO_CONTEXT:
                add_gated(projected[b, parts[at.CONTEXT_GATE] :], followed[b], mixed[b])
            add(mixed[b], x[b])
        normalize(x, weights, offsets[at.FFN_NORM], offsets[at.FFN_NORM_BIAS], centered, eps, h)
        _feed_forward(h, weights, offsets, sizes, x)
        if offsets[at.MODULATION] >= 0:
            for b in range(batch):
                factors = get_row(weights, offsets[at.MODULATION], token_ids[b], width)
                for i in range(width):
                    x[b, i] *= factors[i]
    normalize(x, weights, offsets[at.FINAL_NORM], offsets[at.FINAL_NORM_BIAS], centered, eps, h)
    project(weights, offsets[at.HEAD], -1, h, logits)
    if offsets[at.MIXTURE] >= 0:
        _mix_logits(h, logits, read_ids, votes, match, shares, totals, weights, offsets, sizes)
    for b in range(batch):
        if sizes[at.POINTER_VOTES]:
            gate = weights.dtype.type(sigmoid(projected[b, parts[at.POINTER_GATE]]))
            for n in range(num_reads):
                logits[b, read_ids[b, n]] += gate * votes[b, n]
        counters[b, at.NUM_TOKENS] += 1
        counters[b, at.LAST_TOKEN_ID] = token_ids[b]
        counters[b, at.TEXT_HASH] = counters[b, at.TEXT_HASH] * MULTIPLIER + token_ids[b]
