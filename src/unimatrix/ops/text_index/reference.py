"""The text index by its definition: every unit, and every suffix, is compared with every other."""

import itertools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from unimatrix.ops.text_index.state import (
    COUNT,
    GAPS,
    HAS_LOST_LETTER,
    KNOWN,
    MOST_COUNTED,
    NUM_PLACES,
    NUM_RECENT,
    NUM_TOKENS,
    NUM_UNITS,
    RUN_CODE,
    RUN_LENGTH,
    RUN_MARKS,
    TIMES,
    TextIndex,
    name_units,
    order_tokens,
)
from unimatrix.ops.text_index.suffix_tree import MOST_MATCHED, insert_suffix
from unimatrix.ops.text_index.units import (
    FIRST_HASH,
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


class Unit(NamedTuple):
    """One occurrence of a unit; positions are those of the stream.

    Attributes:
        first: its first token.
        place: its last token.
        known_at: the token with which it is complete.
        content: what it consists of, without case.
    """

    first: int
    place: int
    known_at: int
    content: tuple[int, ...]


class Run(NamedTuple):
    """Letters that may become a word: how many, what is among them, and their hash."""

    length: int = 0
    marks: int = 0
    code: int = FIRST_HASH


def list_units(tokens: list[int], first: int, follows_letter: bool) -> tuple[list[Unit], Run]:
    """Return the units of a text of bytes, in the order in which they are complete.

    Args:
        tokens: bytes, and other tokens, which are no letters.
        first: the position of the first.
        follows_letter: whether a letter came before, so that the first letters are no whole word.

    Returns:
        the units; the letters at the end.
    """
    units: list[Unit] = []
    run, is_cut = Run(), follows_letter
    for i, token in enumerate(tokens):
        if not is_letter(token):
            word = tuple(map(fold, tokens[i - run.length : i]))
            if is_word(run.length, run.marks) and not is_cut:
                units.append(Unit(first + i - run.length, first + i - 1, first + i, word))
            run, is_cut = Run(), False
            continue
        begins_dense = bool(i) and is_dense(tokens[i - 1], token)
        marks = mark_run(run.marks, token, begins_dense)
        run = Run(run.length + 1, marks, extend_hash(run.code, fold(token)))
        pair = tokens[max(0, i - PAIR + 1) : i + 1]
        if len(pair) == PAIR and _is_pair(pair):
            place = first + i
            units.append(Unit(place - PAIR + 1, place, place, tuple(map(fold, pair))))
    return units, run


def _is_pair(pair: list[int]) -> bool:
    """Return whether six bytes are two characters of a script without spaces."""
    return all(
        is_dense(lead, second) and 128 <= second < 192 and 128 <= third < 192
        for lead, second, third in (pair[:3], pair[3:])
    )


def find_longest(text: Tensor, window: int) -> Tensor:
    """Return after every token the longest suffix that occurred before; see ``search_text``.

    Args:
        text: [n] int64, from the start of a stream or of its window on.
        window: W.

    Returns:
        [n, 2] int64, the token that followed, -1 for no match, and the length, 0 for no match.

    Cost:
        O(n^2) time, O(n) memory.
    """
    most = min(MOST_MATCHED, max(1, window // 2))
    matches = torch.stack([torch.full_like(text, -1), torch.zeros_like(text)], dim=1)
    places = torch.arange(len(text))
    common = torch.zeros_like(text)  # of j: the common suffix of the text up to j and up to t
    for t in range(len(text)):
        before = torch.cat([common.new_zeros(1), common[:-1]])
        common = torch.where((text == text[t]) & (places < t), before + 1, 0)
        reached = common.clamp(max=most) * (t - places <= window - most)
        longest = int(reached.max())
        if longest > 0:
            place = int(places[reached == longest].max())
            matches[t, 0], matches[t, 1] = text[place + 1], longest
    return matches


def scan_reference(
    ids: Tensor,
    lengths: Tensor,
    index: TextIndex,
    places: Tensor,
    new_units: Tensor,
    matches: Tensor,
) -> None:
    """Fill what is found for every token and change the index in place; see ``search_text``.

    Args:
        ids: [B, T] int64.
        lengths: [B] int64.
        index: on the CPU.
        places: [B, T, 5, 5] int32.
        new_units: [B, T] int32.
        matches: [B, T, 2] int64.
    """
    windows = order_tokens(index)
    window = windows.shape[1]
    for row, num_tokens in enumerate(lengths.tolist()):
        state = TextIndex(*(part[row] for part in index))
        before, new = windows[row][windows[row] >= 0], ids[row, :num_tokens]
        _scan_row(before.tolist(), new.tolist(), state, places[row], new_units[row])
        text = torch.cat([before, new])
        matches[row, :num_tokens] = find_longest(text, window)[len(before) :]


def _scan_row(
    before: list[int], tokens: list[int], state: TextIndex, places: Tensor, new_units: Tensor
) -> None:
    """Read the tokens of one row after those of its window."""
    window, num_before = len(state.tokens), int(state.counters[NUM_TOKENS])
    text, start = [*before, *tokens], num_before - len(before)
    gap = GAPS[name_units(state)]
    if gap == 0:
        units, run = [], Run()
    elif gap == 1:
        units = [Unit(start + i, start + i, start + i, (x,)) for i, x in enumerate(text)]
        run = Run()
    else:
        units, run = list_units(text, start, bool(state.counters[HAS_LOST_LETTER]))
    num_units = int(state.counters[NUM_UNITS])
    recent = [state.recent_units[i % NUM_RECENT].tolist() for i in range(num_units)[-NUM_RECENT:]]
    for t in range(len(tokens)):
        now = num_before + t
        for unit in (unit for unit in units if unit.known_at == now):
            last = [
                other.place
                for other in units
                if other.content == unit.content
                and other.known_at < now
                and other.first > now - window
            ]
            pair = [*reversed(last[-2:]), -1, -1][:2]
            recent.append([*pair, last[0] if last else -1, len(last), now])
            num_units += 1
        for k, (place, *told, known) in enumerate(_choose_places(recent[-NUM_RECENT:])):
            if now - place < window:
                places[t, k] = places.new_tensor([now - place, *told, now - known])
        last_units = reversed(recent[-NUM_RECENT:])
        new_units[t] = sum((entry[TIMES] == 0) << i for i, entry in enumerate(last_units))
    _set_state(state, text, units, run, start)
    for i, entry in enumerate(recent[-NUM_RECENT:]):
        number = num_units - len(recent[-NUM_RECENT:]) + i
        state.recent_units[number % NUM_RECENT] = state.recent_units.new_tensor(entry)
    state.counters[NUM_UNITS] = num_units


def _choose_places(recent: list[list[int]]) -> list[tuple[int, ...]]:
    """Return what is told of each place that positions are sent to.

    In the order of ``Found.places``, but the place and the token with which its unit was known as
    tokens of the stream.

    Args:
        recent: of the last units what an index keeps of them, the latest unit last.
    """
    known = [(entry[TIMES], age, entry) for age, entry in enumerate(reversed(recent))]
    known = [unit for unit in known if unit[0]]
    sent: list[tuple[int, ...]] = []
    for rank, (times, age, entry) in enumerate(sorted(known)):
        latest, second, oldest = entry[:TIMES]
        kinds = (
            {oldest: 2, second: 1, latest: 0}
            if rank == 0
            else {oldest: 2 * rank + 2, latest: 2 * rank + 1}
        )
        for place in sorted(set(kinds) - {-1}, reverse=True):
            kind = kinds[place]
            sent.append((place, min(times, MOST_COUNTED), age, kind, entry[KNOWN]))
    return sent[:NUM_PLACES]


def _set_state(state: TextIndex, text: list[int], units: list[Unit], run: Run, start: int) -> None:
    """Write the last W tokens, and a table and links of the units that they hold whole."""
    window, now = len(state.tokens), start + len(text)
    for i, token in enumerate(text[-window:], start=max(0, len(text) - window)):
        state.tokens[(start + i) % window] = token
    gap = GAPS[name_units(state)]
    state.links.fill_(-1)
    state.units.zero_()
    state.codes.zero_()
    kept: dict[tuple[int, ...], list[int]] = {}
    for unit in units:
        if unit.first >= now - window and unit.known_at < now:
            kept.setdefault(unit.content, []).append(unit.place % window)
    for content, columns in kept.items():
        code = FIRST_HASH
        for token in content:
            code = extend_hash(code, token)
        code = finish_hash(code, len(content))
        entry = choose_entry(code, len(state.units))
        while int(state.units[entry, COUNT]) > 0:
            entry = (entry + 1) % len(state.units)
        state.units[entry] = state.units.new_tensor([columns[-1], columns[0], len(columns)])
        state.codes[entry] = code - (code >> 31 << 32)
        for one, other in itertools.pairwise(columns):
            state.links[one // gap, 1] = other
            state.links[other // gap, 0] = one
    _plant(state, max(0, now - window), now)
    state.counters[NUM_TOKENS] = now
    if gap > 1:
        state.counters[RUN_LENGTH] = run.length
        state.counters[RUN_CODE], state.counters[RUN_MARKS] = run.code, run.marks
        if len(text) > window:
            state.counters[HAS_LOST_LETTER] = is_letter(text[-window - 1])


def _plant(state: TextIndex, first: int, stop: int) -> None:
    """Make the tree of the suffixes that end in the tokens of the window."""
    window, ends = len(state.tokens), np.empty((2, 2), np.int64)
    state.roots.fill_(-1)
    children, roots = state.children.numpy(), state.roots.numpy()
    known = np.full(window, -1, np.int64)
    for now in range(first, stop):
        known[now % window] = int(state.tokens[now % window])
        insert_suffix(known, children, roots, now % window, ends)
