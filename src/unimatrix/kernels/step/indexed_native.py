"""The indexed attention of one decode step: the keys of what is read, and the read around places.

Of every token of the window one key can be held, by column of the ring: that of the tokens before
it, until the tokens are known that the other key of E28 sees ahead. A key is made when it is first
read and serves until it sees more, so a token costs at most two and most cost none. The keys of 16
neighbouring columns lie number by number side by side, [B, ceil(W / 16), H C, 16], so that 16
scores are sums of whole registers.
"""
# mypy: allow-untyped-defs

import math

import numpy as np

from unimatrix.kernels.step import layout as at
from unimatrix.kernels.step.layout import KEY_BLOCK
from unimatrix.kernels.step.vectors_native import (
    OPTIONS,
    add_log,
    bound,
    copy,
    fill,
    gelu,
    get_row,
    project,
    scale_to_unit_square,
)
from unimatrix.ops.indexed_attention.entries import BEFORE, MOST_MATCHED, NUM_OFFSETS, REACH
from unimatrix.ops.numba.compile import part
from unimatrix.ops.numba.lanes import at as move
from unimatrix.ops.numba.lanes import (
    exponential,
    keep,
    larger,
    largest,
    load,
    minus,
    plus,
    pointer,
    store,
    times,
)
from unimatrix.ops.numba.lanes import total as sum_lanes
from unimatrix.ops.numba.lanes import zeros as zero_lanes
from unimatrix.ops.numba.tiles import add_multiple
from unimatrix.ops.text_index.state import MOST_COUNTED, NUM_KINDS, NUM_PLACES, NUM_RECENT

_LANES = (0,) * KEY_BLOCK
_VALUE_LANES = (0,) * 8
_NO_KEY, _PAST, _BOTH_SIDES = range(3)
_KEYS_AT_ONCE = 16
_MOST_ENTRIES = NUM_PLACES * NUM_OFFSETS


@part(**OPTIONS)
def _convolve_features(weights, offsets, tokens, number, sees_ahead, seen):
    """Write to seen [D] what the key of a token of the stream sees of its neighbours (E28)."""
    width, window = seen.shape[0], tokens.shape[0]
    fill(seen, 0.0)
    first = max(number - REACH, 0)
    last = number + REACH if sees_ahead else number
    for n in range(first, last):
        token_id = tokens[n % window]
        scale = weights[offsets[at.FEATURE_SCALE] + token_id]
        features = get_row(weights, offsets[at.EMBED], token_id, width)
        # Behind the rows of the tokens before it are those of the token and what is ahead of it.
        kernel_row = get_row(weights, offsets[at.KEY_CONV], n - number + REACH, width)
        for i in range(width):
            seen[i] += scale * features[i] * kernel_row[i]


@part(**OPTIONS)
def _hold_keys(number, length, now, held, weights, offsets, width, size):
    """Make those keys of neighbouring tokens that are not held as they are now."""
    tokens, keys, forms = held
    column, num_missing = number % tokens.shape[0], 0
    missing = np.empty(length, np.int64)
    for i in range(length):
        form = _BOTH_SIDES if number + i + REACH - 1 <= now else _PAST
        if forms[column + i] != form:
            forms[column + i] = form
            missing[num_missing] = number + i
            num_missing += 1
    for first in range(0, num_missing, _KEYS_AT_ONCE):
        some = missing[first : min(first + _KEYS_AT_ONCE, num_missing)]
        _make_keys(some, tokens, forms, weights, offsets, width, size, keys)


@part(**OPTIONS)
def _finish_keys(seen, weights, offsets, size, made):
    """Write to made [n, H C] the keys of what convolutions have seen [n, D], which is used up."""
    num_rows, width = seen.shape
    mixed = np.empty((num_rows, width), weights.dtype)
    for i in range(num_rows):
        for j in range(width):
            seen[i, j] = gelu(seen[i, j])
    project(weights, offsets[at.KEY_MIX], offsets[at.KEY_MIX_BIAS], seen, mixed)
    for i in range(num_rows):
        scale_to_unit_square(mixed[i], np.float64(np.finfo(weights.dtype).eps))
    project(weights, offsets[at.PLACE_KEY], -1, mixed, made)
    for i in range(num_rows):
        bound(made[i], size, True)


@part(**OPTIONS)
def _make_keys(numbers, tokens, forms, weights, offsets, width, size, keys):
    """Make the keys of tokens of one stream: ``IndexedAttention.make_keys``.

    A key has the same bits whichever others are made with it.

    Args:
        numbers: [n] int64, of the tokens in the stream.
        tokens: [W], of the index.
        forms: [W] int8, what each key sees.
        weights: as for ``advance``, like the next.
        offsets: of the weights.
        width: D.
        size: C.
        keys: [ceil(W / 16), H C, 16], written.
    """
    window, num_rows, inner = tokens.shape[0], numbers.shape[0], keys.shape[1]
    seen = np.empty((num_rows, width), weights.dtype)
    made = np.empty((num_rows, inner), weights.dtype)
    for i in range(num_rows):
        sees_ahead = forms[numbers[i] % window] == _BOTH_SIDES
        _convolve_features(weights, offsets, tokens, numbers[i], sees_ahead, seen[i])
    _finish_keys(seen, weights, offsets, size, made)
    for i in range(num_rows):
        column = numbers[i] % window
        for j in range(inner):
            keys[column // KEY_BLOCK, j, column % KEY_BLOCK] = made[i, j]


@part(**OPTIONS)
def _copy_text(tokens, number, length, text):
    """Write so many tokens of a stream from one of its numbers on to text; -1 before the first."""
    window = tokens.shape[0]
    column = number % window
    for i in range(length):
        text[i] = tokens[column] if number + i >= 0 else -1
        column = column + 1 if column + 1 < window else 0


@part(**OPTIONS)
def _count_matched(text, length, latest, matched):
    """Write how many tokens before each of the last ones of text are those that end in latest.

    Before the ``length`` tokens in question, text has 16 others; latest [16] has what they are
    compared with.
    """
    for i in range(length):
        last, count = i + MOST_MATCHED - 1, 0
        while count < MOST_MATCHED and text[last - count] == latest[MOST_MATCHED - 1 - count]:
            count += 1
        matched[i] = count


@part(**OPTIONS)
def _score_columns(query, keys, column, length, heads, size, dots):
    """Write query times key of neighbouring columns to dots [H, n].

    Returns at which of the dots the first column stands.
    """
    first, last = column // KEY_BLOCK, (column + length - 1) // KEY_BLOCK
    for head in range(heads):
        q, target = pointer(query, head * size), pointer(dots, head * dots.shape[1])
        for block in range(first, last + 1):
            k = pointer(keys, (block * heads + head) * size * KEY_BLOCK)
            even, odd = zero_lanes(k, _LANES), zero_lanes(k, _LANES)
            for i in range(0, size - 1, 2):
                even = plus(even, times(load(k, i * KEY_BLOCK, _LANES), q[i]))
                odd = plus(odd, times(load(k, (i + 1) * KEY_BLOCK, _LANES), q[i + 1]))
            if size % 2:
                even = plus(even, times(load(k, (size - 1) * KEY_BLOCK, _LANES), q[size - 1]))
            store(target, (block - first) * KEY_BLOCK, plus(even, odd))
    return column % KEY_BLOCK


@part(**OPTIONS)
def _weigh(scores, num_entries):
    """Turn scores [n] into weights beside nothing, whose score is 0; return their sum.

    What follows the entries, up to a whole register, is overwritten.
    """
    source, whole = pointer(scores, 0), -(-num_entries // KEY_BLOCK) * KEY_BLOCK
    best = zero_lanes(source, _LANES)
    for e in range(num_entries, whole):
        source[e] = -np.inf
    for e in range(0, whole, KEY_BLOCK):
        best = larger(load(source, e, _LANES), best)
    shift, sums = largest(best), zero_lanes(source, _LANES)
    for e in range(0, whole, KEY_BLOCK):
        powers = exponential(minus(load(source, e, _LANES), shift))
        store(source, e, powers)
        sums = plus(sums, powers)
    read = np.float64(sum_lanes(sums))  # with less than 1e-36 for what is no entry
    everything = read + math.exp(-np.float64(shift))
    for e in range(0, whole, KEY_BLOCK):
        store(source, e, times(load(source, e, _LANES), scores.dtype.type(1.0 / everything)))
    keep(scores)
    return read / everything


@part(**OPTIONS)
def _hold_unit_key(known_at, sees_ahead, tokens, held, weights, offsets, form):
    """Return which of the held keys is that of the unit that was known with a token.

    ``IndexedAttention.score_units``. A key is made when the unit is first looked at, and again when
    the tokens are known that it sees ahead.
    """
    (keys, known), (width, _, size) = held, form
    row = known_at % known.shape[0]
    if known[row] != 2 * known_at + sees_ahead:
        known[row] = 2 * known_at + sees_ahead
        seen = np.empty((1, width), weights.dtype)
        _convolve_features(weights, offsets, tokens, known_at + 1, sees_ahead, seen[0])
        _finish_keys(seen, weights, offsets, size, keys[row : row + 1])
    return row


@part(**OPTIONS)
def _find_bias(weights, offsets, heads, place, projected, unit_key, head):
    """Return what is added to the scores of a place, but for the score of nothing (E27).

    Args:
        weights: as for ``advance``, like the next.
        offsets: of the weights.
        heads: H.
        place: [5], of ``Found.places``.
        projected: of the position.
        unit_key: [H C], of the unit that sends there; 0 where the window has it no more.
        head: 0 to H - 1.
    """
    size = unit_key.shape[0] // heads
    kinds = projected[heads * (2 * size + NUM_OFFSETS) + head * NUM_KINDS :]
    of_count = weights[offsets[at.COUNT_BIAS] + min(place[1], MOST_COUNTED) * heads + head]
    of_age = weights[offsets[at.AGE_BIAS] + place[2] * heads + head]
    bias = kinds[place[3]] + of_count + of_age
    of_kind = get_row(weights, offsets[at.UNIT_KIND], place[3], unit_key.shape[0])
    for i in range(head * size, (head + 1) * size):
        bias += (projected[heads * size + i] + of_kind[i]) * unit_key[i]
    return bias


@part(**OPTIONS)
def _find_boundary(weights, offsets, heads, entry_ids, entry, head):
    """Return the boundary that the token of an entry is; the one before it may be no entry."""
    of_own = weights[offsets[at.BOUNDARY] + entry_ids[entry] * 2 * heads + head]
    level = np.float64(of_own)
    if entry > 0:
        level += weights[offsets[at.BOUNDARY] + (entry_ids[entry - 1] * 2 + 1) * heads + head]
    return max(level, 0.0) + math.log1p(math.exp(-abs(level)))


@part(**OPTIONS)
def _subtract_boundaries(weights, offsets, entry_ids, first_offset, scores):
    """Take what lies between a place and its entries [n] from their scores [H, n] (E27).

    The entries are neighbours; the first has the offset ``first_offset`` of the place's 80.
    """
    heads, num_entries, place = scores.shape[0], scores.shape[1], BEFORE - first_offset
    for head in range(heads):
        crossed = 0.0
        for entry in range(max(place + 1, 0), num_entries):
            crossed += _find_boundary(weights, offsets, heads, entry_ids, entry, head)
            scores[head, entry] -= crossed
        crossed = 0.0
        for entry in range(place - 1, -1, -1):
            crossed += _find_boundary(weights, offsets, heads, entry_ids, entry + 1, head)
            scores[head, entry] -= crossed


@part(**OPTIONS)
def _score_nothing(projected, new_units, heads, size, head):
    """Return the score of nothing (E27); bit i of ``new_units`` is of the unit i units ago."""
    scores = projected[heads * (2 * size + NUM_OFFSETS + NUM_KINDS) + head * (1 + NUM_RECENT) :]
    score = scores[0]
    for i in range(NUM_RECENT):
        if (new_units >> i) & 1:
            score += scores[1 + i]
    return score


@part(**OPTIONS)
def _score_entries(projected, now, found, held, weights, offsets, form, scores, entry_ids):
    """Write scores [H, n] and token ids [n] of the entries around one row's places; return n.

    Equation: E26, E27.
    """
    (tokens, keys, forms, unit_keys, units_known), (width, heads, size) = held, form
    window, num_entries = tokens.shape[0], 0
    of_tokens, of_units = (tokens, keys, forms), (unit_keys, units_known)
    places, new_units = found
    no_unit = np.zeros(heads * size, weights.dtype)
    farthest = min(now, window - MOST_MATCHED - 1)  # how far back entries are, at most
    dots = np.empty((heads, NUM_OFFSETS + 2 * KEY_BLOCK), scores.dtype)
    latest = np.empty(MOST_MATCHED, np.int64)
    _copy_text(tokens, now - MOST_MATCHED + 1, MOST_MATCHED, latest)
    text = np.empty(MOST_MATCHED + NUM_OFFSETS, np.int64)
    matched = np.empty(NUM_OFFSETS, np.int64)
    forms[now % window] = _NO_KEY  # of the token that this one has replaced
    for p in range(places.shape[0]):
        distance = places[p, 0]
        if distance < 0:
            continue
        unit_key = no_unit
        if places[p, 4] < window - MOST_MATCHED:
            known_at, sees_ahead = now - places[p, 4], places[p, 4] >= REACH
            row = _hold_unit_key(known_at, sees_ahead, tokens, of_units, weights, offsets, form)
            unit_key = unit_keys[row]
        offset = max(0, distance + BEFORE - farthest)
        end = min(NUM_OFFSETS, distance + BEFORE + 1)
        first_offset, first_entry = offset, num_entries
        while offset < end:  # twice where the ring ends in between
            number = now - distance - BEFORE + offset
            column = number % window
            length = min(end - offset, window - column)
            _copy_text(tokens, number - MOST_MATCHED, MOST_MATCHED + length, text)
            _count_matched(text, length, latest, matched)
            copy(text[MOST_MATCHED : MOST_MATCHED + length], entry_ids[num_entries:])
            _hold_keys(number, length, now, of_tokens, weights, offsets, width, size)
            shift = _score_columns(projected, keys, column, length, heads, size, dots)
            for head in range(heads):
                of_nothing = _score_nothing(projected, new_units, heads, size, head)
                of_place = _find_bias(weights, offsets, heads, places[p], projected, unit_key, head)
                of_match = get_row(weights, offsets[at.MATCH_BIAS], head, MOST_MATCHED + 1)
                of_offset = projected[2 * heads * size + head * NUM_OFFSETS + offset :]
                for i in range(length):
                    scores[head, num_entries + i] = (
                        dots[head, shift + i]
                        + of_offset[i]
                        + (of_match[matched[i]] + of_place - of_nothing)
                    )
            offset += length
            num_entries += length
        if offsets[at.BOUNDARY] >= 0:
            own = slice(first_entry, num_entries)
            _subtract_boundaries(weights, offsets, entry_ids[own], first_offset, scores[:, own])
    return num_entries


@part(**OPTIONS)
def _add_shares(scores, entry_ids, num_entries, shares):
    """Write to shares [V] what the entries of each token weigh together."""
    fill(shares, 0.0)
    for e in range(num_entries):
        shares[entry_ids[e]] += scores[e]


@part(**OPTIONS)
def _sum_values(shares, weights, offsets, size, read):
    """Write the values of tokens, weighted with shares [H, V], to read [H C]."""
    heads, vocab_size = shares.shape
    fill(read, 0.0)
    of_tokens, values = pointer(shares, 0), pointer(weights, offsets[at.PLACE_VALUES])
    target = pointer(read, 0)
    for token_id in range(vocab_size):
        for head in range(heads):
            share = of_tokens[head * vocab_size + token_id]
            if share != 0:  # what is no number goes on
                row = (token_id * heads + head) * size
                of_token, of_head = move(values, row), move(target, head * size)
                add_multiple(_VALUE_LANES, of_token, share, size, of_head)


@part(**OPTIONS)
def read_places(x, counters, weights, offsets, sizes, indexed, shares, totals, context):
    """Read around the places of every row: ``IndexedAttention.forward``.

    Args:
        x: [B, D], the stream.
        counters: of every row, before the token is counted.
        weights: as for ``advance``, like the next two.
        offsets: of the weights.
        sizes: of the model.
        indexed: tokens [B, W] of the index, the token among them, what it has found, places
            [B, 1, 5, 5] and new units [B, 1]; keys
            [B, ceil(W / 16), H C, 16] and which of them are held [B, W] int8, keys of units
            [B, 8, H C] and of which token and form they are [B, 8], changed in place.
        shares: [B, H, V], written: what each head gives every token of the vocabulary.
        totals: [B, H], written: the sums of these.
        context: [B, D], written.
    """
    tokens, places, new_units, keys, forms, unit_keys, units_known = indexed
    batch, width = x.shape
    heads, size = sizes[at.INDEX_HEADS], sizes[at.INDEX_HEAD_DIM]
    h = x.copy()
    for b in range(batch):
        scale_to_unit_square(h[b], np.float64(np.finfo(x.dtype).eps))
    projected = np.empty(
        (batch, heads * (2 * size + NUM_OFFSETS + NUM_KINDS + 1 + NUM_RECENT)), x.dtype
    )
    project(weights, offsets[at.PLACE_QUERY], offsets[at.PLACE_QUERY_BIAS], h, projected)
    scores = np.zeros((heads, _MOST_ENTRIES + KEY_BLOCK), x.dtype)
    entry_ids = np.empty(_MOST_ENTRIES, np.int64)
    read = np.empty((batch, heads * size), x.dtype)
    for b in range(batch):
        bound(projected[b, : 2 * heads * size], size, True)
        for i in range(2 * heads * size):
            projected[b, i] *= weights[offsets[at.TEMPERATURE] + i // size]
        held = (tokens[b], keys[b], forms[b], unit_keys[b], units_known[b])
        num_entries = _score_entries(
            projected[b], counters[b, at.NUM_TOKENS], (places[b, 0], new_units[b, 0]), held,
            weights, offsets, (width, heads, size), scores, entry_ids,
        )  # fmt: skip
        for head in range(heads):
            totals[b, head] = _weigh(scores[head], num_entries)
            _add_shares(scores[head], entry_ids, num_entries, shares[b, head])
        _sum_values(shares[b], weights, offsets, size, read[b])
    project(weights, offsets[at.PLACE_OUTPUT], -1, read, context)


@part(**OPTIONS)
def sum_heads(head_scores, totals, sharing):
    """Return ln of a sum with the components of the heads added, [H] each; see ``read_places``."""
    for head in range(totals.shape[0]):
        if totals[head] != 0:
            of_head = np.float64(head_scores[head]) + math.log(np.float64(totals[head]))
            sharing = add_log(sharing, of_head)
    return sharing


@part(**OPTIONS)
def mix_heads(head_scores, shares, sharing, logits):
    """Add what heads read to logits [V] that are ln of probabilities; see ``sum_heads``.

    The scores are used up.
    """
    for head in range(head_scores.shape[0]):
        head_scores[head] = math.exp(np.float64(head_scores[head]) - sharing)
    for token_id in range(logits.shape[0]):
        share = 0.0
        for head in range(head_scores.shape[0]):
            share += np.float64(head_scores[head]) * np.float64(shares[head, token_id])
        if share != 0:
            logits[token_id] = math.log(math.exp(np.float64(logits[token_id])) + share)
