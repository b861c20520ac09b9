"""Which tokens around a place are read: the entries of a position."""

from typing import NamedTuple

from torch import Tensor

BEFORE, AFTER = 32, 48
"""Tokens before a place that are read, and tokens from it on, its own among them."""
NUM_OFFSETS = BEFORE + AFTER
REACH = 12
"""Tokens on each side of a token that make its key."""
MOST_MATCHED = 16
"""Tokens before an entry that are compared with those before the position."""


class Entries(NamedTuple):
    """The tokens that positions read; entry e is offset e mod 80 of place e div 80.

    Attributes:
        rows: [B, T, E] int32, the row of the entry's key: twice the token's column in the text,
            plus 1 where all tokens that its key sees ahead are known; -1 for no entry.
        matched: [B, T, E] int32, how many tokens before it are those before the position, its own
            the last of these; at most 16.
        token_ids: [B, T, E] int64, the tokens; 0 for no entry.
    """

    rows: Tensor
    matched: Tensor
    token_ids: Tensor
