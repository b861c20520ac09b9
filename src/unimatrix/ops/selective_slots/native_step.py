"""Contexts as integers, compiled: ``keys.hash_contexts`` at one position and at all."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unimatrix.ops.numba.compile import kernel, part
from unimatrix.ops.numba.threads import Shaped, map_rows
from unimatrix.ops.selective_slots.native import _scan_rows
from unimatrix.ops.selective_slots.state import HASH_MASK, HASH_MIX, HASH_STEP, NO_KEY

__all__ = ["hash_context", "hash_contexts_native", "scan_token"]

Array = np.ndarray[Any, Any]

_HASHED = 8  # multiply-adds in the time that it takes to hash a token

scan_token = _scan_rows
"""E13 and E14 over rows of one token each, the slots changed in place."""


@part()
def hash_context(stream: Array, last: int, patterns: Array, number: int) -> int:
    """Hash the tokens at a pattern's distances before ``stream[last]``.

    Args:
        stream: [n] int64, -1 where there is no token.
        last: where the context ends.
        patterns: [N, P] int64, distances back, -1 behind the last of each.
        number: the pattern.

    Returns:
        what ``hash_contexts`` returns at that position.
    """
    hashed = np.int64(number + 1)
    token = np.int64(NO_KEY)
    length = 0
    for distance in patterns[number]:
        if distance < 0:
            break
        length += 1
        place = last - distance
        token = stream[place] if place >= 0 else np.int64(NO_KEY)
        if token < 0:
            return NO_KEY
        hashed = (hashed ^ (token + 1)) * np.int64(HASH_STEP)
        hashed = (hashed ^ ((hashed >> 29) & np.int64(2**35 - 1))) * np.int64(HASH_MIX)
    if patterns.shape[0] == 1 and length == 1:
        return int(token)
    return int((hashed ^ ((hashed >> 32) & np.int64(2**32 - 1))) & np.int64(HASH_MASK))


@kernel()
def _hash_rows(first_row: int, last_row: int, ids: Array, patterns: Array, keys: Array) -> None:
    for b in range(first_row, last_row):
        for t in range(ids.shape[1]):
            for number in range(patterns.shape[0]):
                keys[b, t, number] = hash_context(ids[b], t, patterns, number)


def hash_contexts_native(ids: Tensor, patterns: Sequence[Sequence[int]]) -> Tensor:
    """Hash contexts on the CPU; arguments as in ``keys.hash_contexts``."""
    table = _tabulate(tuple(map(tuple, patterns)))
    keys = torch.empty(*ids.shape, len(patterns), dtype=torch.int64)
    work = _HASHED * ids.numel() * table.numel()
    map_rows(_hash_rows, ids.shape[0], *map(Shaped, (ids.contiguous(), table, keys)), work=work)
    return keys


@functools.lru_cache(maxsize=64)
def _tabulate(patterns: tuple[tuple[int, ...], ...]) -> Tensor:
    """Return the patterns [N, P], -1 behind the last distance of each."""
    table = torch.full((len(patterns), max(map(len, patterns))), -1)
    for number, pattern in enumerate(patterns):
        table[number, : len(pattern)] = torch.tensor(pattern)
    return table
