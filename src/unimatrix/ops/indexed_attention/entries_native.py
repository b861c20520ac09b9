"""Which tokens around a place are read, compiled."""
# mypy: allow-untyped-defs

from torch import Tensor

from unimatrix.ops.indexed_attention.entries import BEFORE, MOST_MATCHED, NUM_OFFSETS, REACH
from unimatrix.ops.numba.compile import kernel
from unimatrix.ops.numba.lanes import OPTIONS
from unimatrix.ops.numba.products import LANES
from unimatrix.ops.numba.threads import run_rows
from unimatrix.ops.operator import declare_operator


@kernel(**OPTIONS)
def _find_rows(
    first, last, lanes, num_tokens, num_columns, num_places, window,
    text, distances, rows, matched, token_ids,
):  # fmt: skip
    """Set row and token of every entry, -1 and 0 for none, and how many tokens before it match."""
    num_entries = num_places * NUM_OFFSETS
    for row in range(first, last):
        batch, t = row // num_tokens, row % num_tokens
        start, now = batch * num_columns, num_columns - num_tokens + t
        for e in range(num_entries):
            entry = row * num_entries + e
            distance = distances[row * num_places + e // NUM_OFFSETS]
            rows[entry], matched[entry], token_ids[entry] = -1, 0, 0
            if distance < 0:
                continue
            column = now - distance + e % NUM_OFFSETS - BEFORE
            if column < 0 or column > now or now - column >= window - MOST_MATCHED:
                continue
            if text[start + column] < 0:
                continue
            token_ids[entry] = text[start + column]
            rows[entry] = 2 * column + (1 if column + REACH - 1 <= now else 0)
            length = 0
            while (
                length < MOST_MATCHED
                and length < column
                and text[start + column - 1 - length] == text[start + now - length]
            ):
                length += 1
            matched[entry] = length


def _find_entries(text: Tensor, distances: Tensor, window: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, num_tokens, num_places = distances.shape
    found = _list_found(text, distances, window)
    sizes = (num_tokens, text.shape[1], num_places, window)
    work = 4 * num_places * NUM_OFFSETS
    run_rows(_find_rows, LANES, batch * num_tokens, work, *sizes, text, distances, *found)
    return found


def _list_found(text: Tensor, distances: Tensor, window: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, num_tokens, num_places = distances.shape
    rows = distances.new_empty(batch, num_tokens, num_places * NUM_OFFSETS)
    return rows, rows.new_empty(rows.shape), text.new_empty(rows.shape)


find_entries_native = declare_operator("find_entries", _find_entries, shapes=_list_found)
"""Return the fields of ``Entries``; see ``find_entries``."""
