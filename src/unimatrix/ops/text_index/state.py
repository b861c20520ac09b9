"""What the text index carries: the last W tokens, and where each unit stood among them."""

from typing import NamedTuple

import torch
from torch import Tensor

from unimatrix.errors import InputError, require_choice
from unimatrix.ops.text_index.suffix_tree import MOST_MATCHED, NUM_ROOTS
from unimatrix.ops.text_index.units import FIRST_HASH, MOST_LETTERS

NUM_RECENT = 8
"""Units of which one sends a position to where it stood before."""
NUM_PLACES = 5
"""Places that a position has at most."""
NUM_KINDS = 11
"""Kinds of places: of the rarest unit the latest, the one before it and the oldest; of each of the
next four the latest and the oldest."""
UNITS = ("words", "tokens", "none")
"""What is found again beside the longest suffix: words of bytes, single tokens, or nothing."""
GAPS = {"words": 2, "tokens": 1, "none": 0}
"""Columns of the text for each row of links."""
MOST_COUNTED = 7
"""Units that stood more often count as having stood so often."""
LEAST_WINDOW = 2 * max(MOST_LETTERS, MOST_MATCHED)
NUM_TOKENS, RUN_LENGTH, RUN_CODE, RUN_MARKS, NUM_UNITS, HAS_LOST_LETTER = range(6)
"""Columns of ``counters``: tokens read; letters of the run that may become a unit, a hash of them,
and what is among them; units read; whether the token before the window was a letter."""
NUM_COUNTERS = 6
TIMES, KNOWN = 3, 4
"""Columns of ``recent_units`` behind the places of a unit."""
NUM_TOLD = 5
"""What is told of a place; see ``Found``."""
LATEST, OLDEST, COUNT = range(3)
"""Columns of ``units``."""


class TextIndex(NamedTuple):
    """The last W tokens of each stream and an index of them, on the CPU.

    A column is int16 where the window has less than 32,768 tokens, otherwise int32.

    Attributes:
        tokens: [B, W] int16, or int32 where the vocabulary has more tokens; token n of the stream
            is in column n mod W, -1 where there is none yet.
        links: [B, W / g, 2], the columns of a unit's occurrence before and after the one whose
            place is in column g i to g i + g - 1; -1 for none. g is 2 for words and 1 for tokens;
            without units there are no links and S is 0.
        units: [B, S, 3], a hash table: columns of a unit's latest and oldest place, and how often
            it is remembered; 0 for an empty entry.
        codes: [B, S] int32, hashes of these units, with their lengths.
        children: [B, W, 2], the tree of suffixes; see ``suffix_tree``.
        roots: [B, 256], columns of its latest suffixes.
        recent_units: [B, 8, 5] int64, of the last units the latest, second latest and oldest place
            before, in tokens of the stream (-1 for none), how often they were remembered, and the
            token with which they were known (-1 for no unit).
        counters: [B, 6] int64.
    """

    tokens: Tensor
    links: Tensor
    units: Tensor
    codes: Tensor
    children: Tensor
    roots: Tensor
    recent_units: Tensor
    counters: Tensor


def require_window(name: str, window: int, units: str) -> None:
    """Raise ``InputError`` unless a window is even, and long enough for any unit; see ``UNITS``."""
    require_choice("units is", units, UNITS)
    if units == "none":
        if not 1 <= window < 2**30:
            raise InputError(f"{name} is {window}; pass 1 to {2**30 - 1} tokens, or None")
    elif window < LEAST_WINDOW or window % 2 or window >= 2**24:
        raise InputError(
            f"{name} is {window}; pass an even number of {LEAST_WINDOW} to {2**24 - 2} tokens"
        )


def list_shapes(batch: int, window: int, units: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of an index by the name of the tensor; see ``TextIndex``."""
    # Words of two characters begin every three bytes. An eighth of the entries stays empty.
    num_entries = {"words": 3 * window // 8 + 64, "tokens": 3 * window // 2, "none": 0}[units]
    num_links = window // GAPS[units] if GAPS[units] else 0
    return {
        "tokens": (batch, window),
        "links": (batch, num_links, 2),
        "units": (batch, num_entries, COUNT + 1),
        "codes": (batch, num_entries),
        "children": (batch, window, 2),
        "roots": (batch, NUM_ROOTS),
        "recent_units": (batch, NUM_RECENT, KNOWN + 1),
        "counters": (batch, NUM_COUNTERS),
    }


def _choose_type(name: str, window: int, of_tokens: torch.dtype) -> torch.dtype:
    """Return the type of a tensor of an index."""
    if name in ("recent_units", "counters"):
        return torch.int64
    if name == "codes":
        return torch.int32
    if name == "tokens":
        return of_tokens
    return torch.int16 if window < 2**15 else torch.int32


def require_form(index: TextIndex, batch: int, window: int, units: str, dtype: torch.dtype) -> None:
    """Raise ``InputError`` unless all tensors have the shapes and types of such an index.

    Args:
        index: of which nothing is known.
        batch, window, units: as for ``empty_index``.
        dtype: of the tokens.
    """
    for name, shape in list_shapes(batch, window, units).items():
        tensor = getattr(index, name)
        expected = _choose_type(name, window, dtype)
        if tensor.shape != shape or tensor.dtype != expected:
            raise InputError(
                f"index.{name} is {tensor.dtype} {list(tensor.shape)}, not {expected} "
                f"{list(shape)}; pass an index that this model has made"
            )


def choose_token_type(vocab_size: int) -> torch.dtype:
    """Return the type of the tokens that an index holds."""
    return torch.int16 if vocab_size <= 2**15 else torch.int32


def empty_index(batch: int, window: int, vocab_size: int, units: str) -> TextIndex:
    """Return the index of empty streams.

    Args:
        batch: B.
        window: W, the tokens that are remembered.
        vocab_size: V.
        units: one of ``UNITS``.

    Raises:
        InputError: if the window is odd, too short or too long.
    """
    require_window("window", window, units)
    of_tokens = choose_token_type(vocab_size)
    filled = {"units": 0, "codes": 0, "children": 0, "counters": 0}
    index = TextIndex(
        *(
            torch.full(shape, filled.get(name, -1), dtype=_choose_type(name, window, of_tokens))
            for name, shape in list_shapes(batch, window, units).items()
        )
    )
    index.recent_units[..., TIMES] = 0
    index.counters[:, RUN_CODE] = FIRST_HASH
    return index


def copy_index(index: TextIndex) -> TextIndex:
    """Return a copy that shares nothing, contiguous on the CPU."""
    layout = torch.contiguous_format
    return TextIndex(*(x.to("cpu", copy=True, memory_format=layout) for x in index))


def order_tokens(index: TextIndex) -> Tensor:
    """Return the tokens of each window in the order of the stream, [B, W] int64; -1 comes first."""
    window = index.tokens.shape[1]
    first = index.counters[:, NUM_TOKENS, None]  # the oldest, or an empty column
    columns = (first + torch.arange(window)) % window
    return index.tokens.long().gather(1, columns)


def name_units(index: TextIndex) -> str:
    """Return which of ``UNITS`` an index finds."""
    num_links, window = index.links.shape[-2], index.tokens.shape[-1]
    return {0: "none", window: "tokens"}.get(num_links, "words")
