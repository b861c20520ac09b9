"""The text index, compiled: a hash table of units, and links from occurrence to occurrence."""
# mypy: allow-untyped-defs

import numpy as np
from torch import Tensor

from unimatrix.ops.numba.compile import kernel, part
from unimatrix.ops.numba.threads import Shaped, map_rows
from unimatrix.ops.text_index.state import (
    COUNT,
    GAPS,
    HAS_LOST_LETTER,
    KNOWN,
    LATEST,
    MOST_COUNTED,
    NUM_PLACES,
    NUM_RECENT,
    NUM_TOKENS,
    NUM_TOLD,
    NUM_UNITS,
    OLDEST,
    RUN_CODE,
    RUN_LENGTH,
    RUN_MARKS,
    TIMES,
    TextIndex,
    name_units,
)
from unimatrix.ops.text_index.suffix_tree import insert_suffix
from unimatrix.ops.text_index.units import (
    FIRST_HASH,
    MOST_LETTERS,
    PAIR,
    choose_entry,
    extend_hash,
    finish_hash,
    fold,
    is_dense,
    is_letter,
    is_word,
    mark_run,
)

_choose_entry, _extend_hash, _fold = part()(choose_entry), part()(extend_hash), part()(fold)
_finish_hash = part()(finish_hash)
_is_dense, _is_letter, _is_word = part()(is_dense), part()(is_letter), part()(is_word)
_mark_run = part()(mark_run)
_insert_suffix = part()(insert_suffix)


@part()
def _read_folded(tokens, column, folds):
    """Return a token as it is compared."""
    return _fold(tokens[column]) if folds else tokens[column]


@part()
def _hash_span(tokens, first, length, folds):
    """Return the hash of the unit of so many tokens from a column on."""
    code, window, column = FIRST_HASH, len(tokens), first
    for _ in range(length):
        code = _extend_hash(code, _read_folded(tokens, column, folds))
        column = column + 1 if column + 1 < window else 0
    return _finish_hash(code, length)


@part()
def _end_alike(tokens, one, other, length, folds):
    """Return whether so many tokens up to two columns are the same."""
    window = len(tokens)
    for _ in range(length):
        if _read_folded(tokens, one, folds) != _read_folded(tokens, other, folds):
            return False
        one = one - 1 if one > 0 else window - 1
        other = other - 1 if other > 0 else window - 1
    return True


@part()
def _find_entry(tokens, units, codes, column, length, code, folds):
    """Return the entry of the unit that ends in a column, or the empty one where it belongs.

    Units of equal hashes have equal lengths, so comparing the tokens leaves no doubt.
    """
    entry = _choose_entry(code, len(units))
    while units[entry, COUNT] > 0:
        if codes[entry] & 0xFFFFFFFF == code and _end_alike(
            tokens, column, units[entry, LATEST], length, folds
        ):
            break
        entry = entry + 1 if entry + 1 < len(units) else 0
    return entry


@part()
def _drop_entry(units, codes, entry):
    """Empty an entry, and move up what it had displaced."""
    num_entries, gap = len(units), entry
    while True:
        entry = entry + 1 if entry + 1 < num_entries else 0
        if units[entry, COUNT] == 0:
            break
        first = _choose_entry(codes[entry] & 0xFFFFFFFF, num_entries)
        # Moved if the search for it, from `first` on, comes past the gap.
        if (entry - first) % num_entries >= (entry - gap) % num_entries:
            for i in range(3):
                units[gap, i] = units[entry, i]
            codes[gap] = codes[entry]
            gap = entry
    for i in range(3):
        units[gap, i] = 0
    codes[gap] = 0


@part()
def _add_unit(tokens, links, units, codes, recent, counters, place, length, code, gap):
    """Note where the unit that ends with a token stood before, and remember it.

    It is known with the last token read.
    """
    window = len(tokens)
    column = place % window
    entry = _find_entry(tokens, units, codes, column, length, code, gap > 1)
    row, link = counters[NUM_UNITS] % NUM_RECENT, column // gap
    counters[NUM_UNITS] += 1
    count = units[entry, COUNT]
    recent[row, 0], recent[row, 1], recent[row, 2], recent[row, TIMES] = -1, -1, -1, count
    recent[row, KNOWN] = counters[NUM_TOKENS] - 1
    links[link, 0], links[link, 1] = -1, -1
    if count > 0:
        latest = units[entry, LATEST]
        second = links[latest // gap, 0]
        recent[row, 0] = place - (column - latest) % window
        recent[row, 1] = place - (column - second) % window if second >= 0 else -1
        recent[row, 2] = place - (column - units[entry, OLDEST]) % window
        links[link, 0] = latest
        links[latest // gap, 1] = column
    else:
        units[entry, OLDEST] = column
        codes[entry] = code - (code >> 31 << 32)
    units[entry, LATEST] = column
    units[entry, COUNT] = count + 1


@part()
def _forget_unit(tokens, links, units, codes, first, length, gap):
    """Forget the oldest occurrence of a unit, which begins in a column."""
    column = (first + length - 1) % len(tokens)
    code = _hash_span(tokens, first, length, gap > 1)
    entry = _find_entry(tokens, units, codes, column, length, code, gap > 1)
    following = links[column // gap, 1]
    if following < 0:
        _drop_entry(units, codes, entry)
    else:
        links[following // gap, 0] = -1
        units[entry, OLDEST] = following
        units[entry, COUNT] -= 1


@part()
def _is_pair(tokens, first):
    """Return whether two characters of a script without spaces begin in a column."""
    window = len(tokens)
    for start in range(first, first + PAIR, 3):
        if not _is_dense(tokens[start % window], tokens[(start + 1) % window]):
            return False
        for i in range(start + 1, start + 3):
            if not 128 <= tokens[i % window] < 192:
                return False
    return True


@part()
def _forget_token(tokens, links, units, codes, counters, gap):
    """Forget the unit that begins with the oldest token, which the next one replaces."""
    window = len(tokens)
    first = counters[NUM_TOKENS] % window
    token = tokens[first]
    if token < 0:
        return
    if gap == 1:
        _forget_unit(tokens, links, units, codes, first, 1, gap)
        return
    if token >= 0xE0 and _is_pair(tokens, first):
        _forget_unit(tokens, links, units, codes, first, PAIR, gap)
    if _is_letter(token) and counters[HAS_LOST_LETTER] == 0:
        column, length, marks, before = first, 0, 0, 0
        while length <= MOST_LETTERS and _is_letter(tokens[column]):
            marks = _mark_run(marks, tokens[column], _is_dense(before, tokens[column]))
            before = tokens[column]
            length += 1
            column = column + 1 if column + 1 < window else 0
        if _is_word(length, marks):
            _forget_unit(tokens, links, units, codes, first, length, gap)
    counters[HAS_LOST_LETTER] = _is_letter(token)


@part()
def _read_token(token, tokens, links, units, codes, recent, counters, gap):
    """Read one token."""
    window, now = len(tokens), counters[NUM_TOKENS]
    if now >= window and gap > 0:
        _forget_token(tokens, links, units, codes, counters, gap)
    column = now % window
    before = tokens[column - 1 if column > 0 else window - 1]
    tokens[column] = token
    counters[NUM_TOKENS] += 1
    if gap == 0:
        return
    if gap == 1:
        code = _finish_hash(_extend_hash(FIRST_HASH, token), 1)
        _add_unit(tokens, links, units, codes, recent, counters, now, 1, code, gap)
        return
    length = counters[RUN_LENGTH]
    if not _is_letter(token):
        marks, code = counters[RUN_MARKS], counters[RUN_CODE]
        counters[RUN_LENGTH], counters[RUN_MARKS], counters[RUN_CODE] = 0, 0, FIRST_HASH
        if _is_word(length, marks):
            code = _finish_hash(code, length)
            _add_unit(tokens, links, units, codes, recent, counters, now - 1, length, code, gap)
        return
    if length == 0:
        before = 0
    counters[RUN_MARKS] = _mark_run(counters[RUN_MARKS], token, _is_dense(before, token))
    counters[RUN_CODE] = _extend_hash(counters[RUN_CODE], _fold(token))
    counters[RUN_LENGTH] = length + 1
    start = (now - PAIR + 1) % window
    if token >= 128 and length + 1 >= PAIR and _is_pair(tokens, start):
        code = _hash_span(tokens, start, PAIR, True)
        _add_unit(tokens, links, units, codes, recent, counters, now, PAIR, code, gap)


@part()
def _choose_rarest(recent, num_units, chosen):
    """Return the row of the recent unit that stood least often before, the latest of equals.

    -1 if there is none; bit i of ``chosen`` is set for a row that is not looked at.
    """
    best = -1
    for back in range(1, min(num_units, NUM_RECENT) + 1):
        i = (num_units - back) % NUM_RECENT
        is_known = recent[i, TIMES] > 0 and (chosen >> i) & 1 == 0
        if is_known and (best < 0 or recent[i, TIMES] < recent[best, TIMES]):
            best = i
    return best


@part()
def _choose_places(recent, num_units, sent):
    """Set what is told of each place that positions are sent to; return how many.

    In the order of ``Found.places``, but the place and the token with which its unit was known as
    tokens of the stream.
    """
    num_sent, chosen = 0, 0
    for rank in range(NUM_RECENT):
        i = _choose_rarest(recent, num_units, chosen)
        if i < 0:
            break
        chosen |= 1 << i
        before = recent[i, 0] + 1
        for k in range(TIMES):
            # Two of a unit's three places may be the same.
            is_new = 0 <= recent[i, k] < before
            if num_sent < NUM_PLACES and is_new and (k != 1 or rank == 0):
                sent[num_sent, 0] = recent[i, k]
                sent[num_sent, 1] = min(recent[i, TIMES], MOST_COUNTED)
                sent[num_sent, 2] = (num_units - 1 - i) % NUM_RECENT
                sent[num_sent, 3] = k if rank == 0 else 2 * rank + 1 + k // 2
                sent[num_sent, 4] = recent[i, KNOWN]
                before = recent[i, k]
                num_sent += 1
    return num_sent


@part()
def _mark_new(recent, num_units):
    """Return a number of which bit i is set if the unit i units ago had not been remembered."""
    marks = 0
    for i in range(min(num_units, NUM_RECENT)):
        if recent[(num_units - 1 - i) % NUM_RECENT, TIMES] == 0:
            marks |= 1 << i
    return marks


@kernel()
def _scan_rows(
    first, last, ids, lengths, places, new_units, matches, tokens, links, units, codes, children,
    roots, recent, counters, gap,
):  # fmt: skip
    window = tokens.shape[1]
    sent = np.empty((NUM_PLACES, NUM_TOLD), np.int64)
    ends = np.empty((2, 2), np.int64)
    for row in range(first, last):
        text, chain, table, names = tokens[row], links[row], units[row], codes[row]
        tree, newest = children[row], roots[row]
        units_read, count, found, matched = recent[row], counters[row], places[row], matches[row]
        num_units, num_sent, marks = -1, 0, 0
        for t in range(lengths[row]):
            _read_token(ids[row, t], text, chain, table, names, units_read, count, gap)
            column = (count[NUM_TOKENS] - 1) % window
            distance, length = _insert_suffix(text, tree, newest, column, ends)
            if length > 0:
                following = column - distance + 1
                matched[t, 0] = text[following if following >= 0 else following + window]
                matched[t, 1] = length
            if count[NUM_UNITS] != num_units:
                num_units = count[NUM_UNITS]
                num_sent = _choose_places(units_read, num_units, sent)
                marks = _mark_new(units_read, num_units)
            new_units[row, t] = marks
            for k in range(num_sent):
                distance = count[NUM_TOKENS] - 1 - sent[k, 0]
                if distance < window:
                    found[t, k, 0] = distance
                    for i in range(1, 4):
                        found[t, k, i] = sent[k, i]
                    found[t, k, 4] = count[NUM_TOKENS] - 1 - sent[k, 4]


def scan_native(
    ids: Tensor,
    lengths: Tensor,
    index: TextIndex,
    places: Tensor,
    new_units: Tensor,
    matches: Tensor,
) -> None:
    """Fill what is found for every token and change the index in place.

    See ``search_text``.

    Args:
        ids: [B, T] int64, contiguous, on the CPU.
        lengths: [B] int64.
        index: contiguous.
        places: [B, T, 5, 5] int32.
        new_units: [B, T] int32.
        matches: [B, T, 2] int64.
    """
    gap = GAPS[name_units(index)]
    arrays = (ids, lengths, places, new_units, matches, *index)
    map_rows(_scan_rows, len(ids), *map(Shaped, arrays), gap)
