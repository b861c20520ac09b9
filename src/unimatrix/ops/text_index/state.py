"""What the text index carries: the last W tokens, and where each unit stood among them."""

from typing import NamedTuple

import torch
from torch import Tensor

from unimatrix.errors import InputError
from unimatrix.ops.text_index.units import FIRST_HASH, MOST_LETTERS

NUM_RECENT = 8
"""Units of which one sends a position to where it stood before."""
NUM_PLACES = 5
"""Places that a position has at most."""
NUM_KINDS = 7
"""Kinds of places: of the rarest unit the latest, the one before it and the oldest; of each of the
next four the latest."""
MOST_COUNTED = 7
"""Units that stood more often count as having stood so often."""
LEAST_WINDOW = 2 * MOST_LETTERS
NUM_TOKENS, RUN_LENGTH, RUN_CODE, RUN_MARKS, NUM_UNITS, HAS_LOST_LETTER = range(6)
"""Columns of ``counters``: tokens read; letters of the run that may become a unit, a hash of them,
and what is among them; units read; whether the token before the window was a letter."""
NUM_COUNTERS = 6
TIMES = 3
"""Column of ``recent_units`` behind the places of a unit."""
LATEST, OLDEST, COUNT, CODE = range(4)
"""Columns of ``units``."""


class TextIndex(NamedTuple):
    """The last W tokens of each stream and an index of their units, on the CPU.

    Attributes:
        tokens: [B, W] int16, or int32 where the vocabulary has more tokens; token n of the stream
            is in column n mod W, -1 where there is none yet.
        links: [B, W / g, 2] int32, the columns of a unit's occurrence before and after the one
            whose place is in column g i to g i + g - 1; -1 for none. g is 2 for words and 1 for
            tokens.
        units: [B, S, 4] int32, a hash table: columns of a unit's latest and oldest place, how often
            it is remembered (0 for an empty entry) and a hash of it, with its length.
        recent_units: [B, 8, 4] int64, of the last units the latest, second latest and oldest place
            before, in tokens of the stream (-1 for none), and how often they were remembered.
        counters: [B, 6] int64.
    """

    tokens: Tensor
    links: Tensor
    units: Tensor
    recent_units: Tensor
    counters: Tensor


def require_window(name: str, window: int) -> None:
    """Raise ``InputError`` unless a window is even, and long enough for any unit."""
    if window < LEAST_WINDOW or window % 2 or window >= 2**24:
        raise InputError(
            f"{name} is {window}; pass an even number of {LEAST_WINDOW} to {2**24 - 2} tokens"
        )


_TYPES = {"links": torch.int32, "units": torch.int32}
"""Of the tensors that are not int64, but for the tokens."""


def list_shapes(batch: int, window: int, reads_bytes: bool) -> dict[str, tuple[int, ...]]:
    """Return the shapes of an index by the name of the tensor; see ``TextIndex``."""
    # Words of two characters begin every three bytes. An eighth of the entries stays empty.
    num_entries = 3 * window // 8 + 64 if reads_bytes else 3 * window // 2
    return {
        "tokens": (batch, window),
        "links": (batch, window // (2 if reads_bytes else 1), 2),
        "units": (batch, num_entries, CODE + 1),
        "recent_units": (batch, NUM_RECENT, TIMES + 1),
        "counters": (batch, NUM_COUNTERS),
    }


def require_form(
    index: TextIndex, batch: int, window: int, reads_bytes: bool, dtype: torch.dtype
) -> None:
    """Raise ``InputError`` unless all tensors have the shapes and types of such an index.

    Args:
        index: of which nothing is known.
        batch, window, reads_bytes: as for ``empty_index``.
        dtype: of the tokens.
    """
    for name, shape in list_shapes(batch, window, reads_bytes).items():
        tensor = getattr(index, name)
        expected = dtype if name == "tokens" else _TYPES.get(name, torch.int64)
        if tensor.shape != shape or tensor.dtype != expected:
            raise InputError(
                f"index.{name} is {tensor.dtype} {list(tensor.shape)}, not {expected} "
                f"{list(shape)}; pass an index that this model has made"
            )


def choose_token_type(vocab_size: int) -> torch.dtype:
    """Return the type of the tokens that an index holds."""
    return torch.int16 if vocab_size <= 2**15 else torch.int32


def empty_index(batch: int, window: int, vocab_size: int, reads_bytes: bool) -> TextIndex:
    """Return the index of empty streams.

    Args:
        batch: B.
        window: W, the tokens that are remembered.
        vocab_size: V.
        reads_bytes: whether units are words of bytes; otherwise every token is one.

    Raises:
        InputError: if the window is odd, too short or too long.
    """
    require_window("window", window)
    shapes = list_shapes(batch, window, reads_bytes)
    recent = torch.full(shapes["recent_units"], -1, dtype=torch.int64)
    recent[..., TIMES] = 0
    counters = torch.zeros(shapes["counters"], dtype=torch.int64)
    counters[:, RUN_CODE] = FIRST_HASH
    return TextIndex(
        tokens=torch.full(shapes["tokens"], -1, dtype=choose_token_type(vocab_size)),
        links=torch.full(shapes["links"], -1, dtype=torch.int32),
        units=torch.zeros(shapes["units"], dtype=torch.int32),
        recent_units=recent,
        counters=counters,
    )


def order_tokens(index: TextIndex) -> Tensor:
    """Return the tokens of each window in the order of the stream, [B, W] int64; -1 comes first."""
    window = index.tokens.shape[1]
    first = index.counters[:, NUM_TOKENS, None]  # the oldest, or an empty column
    columns = (first + torch.arange(window)) % window
    return index.tokens.long().gather(1, columns)
