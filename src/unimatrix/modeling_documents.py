"""Where documents start in rows that hold several, as every library says it."""

from collections.abc import Mapping
from typing import Any, TypedDict

import torch
from torch import Tensor

from unimatrix.errors import InputError
from unimatrix.nn.padding import Padding


class DocumentMarks(TypedDict, total=False):
    """What callers say of the documents in their rows, beside ``position_ids``.

    Attributes:
        seq_idx: [B, T], [1, T] or [T], one number for all tokens of a document (transformers, for
            Mamba-2 and its like).
        cu_seqlens: [N + 1], where each document starts among the B T tokens, and their number at
            the end (flash-linear-attention).
        cu_seq_lens_q: the same (transformers, for FlashAttention).
        cu_seq_lens_k: the same.
        max_length_q: at least the tokens of the longest document.
        max_length_k: the same.
    """

    seq_idx: Tensor | None
    cu_seqlens: Tensor | None
    cu_seq_lens_q: Tensor | None
    cu_seq_lens_k: Tensor | None
    max_length_q: Tensor | int | None
    max_length_k: Tensor | int | None


def find_starts(
    marks: Mapping[str, Any],
    position_ids: Tensor | None,
    ids: Tensor,
    num_before: Tensor,
    padding: Padding | None,
    *,
    has_table: bool,
) -> Tensor | None:
    """Return where documents start, ``None`` where no row holds more than one.

    Args:
        marks: ``DocumentMarks`` that are not ``None``.
        position_ids: [B, T], [1, T] or [T]; a document starts where it does not count on.
        ids: [B, T].
        num_before: [B] int64, real tokens read before these.
        padding: where it is; ``None`` is none. What stands there does not matter.
        has_table: whether the model embeds positions, so that it matters where they start.

    Returns:
        [B, T] bool, real tokens first in each row, whose first token starts a document.

    Raises:
        InputError: for marks that do not fit the tokens or each other, and positions that skip.
    """
    found: dict[str, Tensor] = {}
    if position_ids is not None:
        positions = _read_rows("position_ids", position_ids, ids)
        found["position_ids"] = _find_restarts(positions, num_before, padding, has_table=has_table)
    for name, value in marks.items():
        if name == "seq_idx":
            assert isinstance(value, Tensor)
            found[name] = _find_changes(_read_rows(name, value, ids), padding)
        elif name.startswith("cu_"):
            found[name] = _find_changes(_number_documents(name, value, ids), padding)
    _require_agreement(found, padding)
    starts = next(iter(found.values()), None)
    _require_lengths(marks, starts, ids, padding)
    return starts if starts is not None and bool(starts[:, 1:].any()) else None


def _read_rows(name: str, given: Tensor, ids: Tensor) -> Tensor:
    """Return one value for each token, [B, T]; raise ``InputError`` for another shape."""
    batch, num_tokens = ids.shape
    if tuple(given.shape) not in {(batch, num_tokens), (1, num_tokens), (num_tokens,)}:
        raise InputError(
            f"{name} has shape {list(given.shape)}; pass {list(ids.shape)}, or leave it out"
        )
    return given.to(ids.device).expand_as(ids)


def _find_real(ids: Tensor, padding: Padding | None) -> Tensor:
    """Return which places hold real tokens, real tokens first, [B, T] bool."""
    if padding is None:
        return torch.ones_like(ids, dtype=torch.bool)
    return torch.arange(ids.shape[1], device=ids.device) < padding.lengths.unsqueeze(1)


def _find_changes(numbers: Tensor, padding: Padding | None) -> Tensor:
    """Return where numbers [B, T] of documents change from one real token to the next.

    The first token of each row is one such place. [B, T] bool, real tokens first.
    """
    numbers = numbers if padding is None else padding.pack(numbers)
    changes = torch.ones_like(numbers, dtype=torch.bool)
    changes[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
    return changes & _find_real(numbers, padding)


def _number_documents(name: str, given: Tensor | int, ids: Tensor) -> Tensor:
    """Return the number of each token's document, [B, T]; raise ``InputError`` for other bounds."""
    if not isinstance(given, Tensor) or given.dim() != 1 or given.is_floating_point():
        what = f"shape {list(given.shape)} {given.dtype}" if isinstance(given, Tensor) else given
        raise InputError(
            f"{name} is {what}; pass [documents + 1] whole numbers: where each starts, and the "
            "number of all tokens"
        )
    bounds, num_tokens = given.to(ids.device).long(), ids.numel()
    is_whole = len(bounds) > 1 and int(bounds[0]) == 0 and int(bounds[-1]) == num_tokens
    if not is_whole or bool((bounds.diff() < 0).any()):
        raise InputError(
            f"{name} is {_shorten(bounds)}; pass numbers that rise from 0 to {num_tokens}, the "
            "number of all tokens"
        )
    rows = torch.arange(0, num_tokens, ids.shape[1], device=ids.device)
    apart = rows[~torch.isin(rows, bounds)]
    if len(apart):
        raise InputError(
            f"{name} is {_shorten(bounds)}, with no document that starts at {int(apart[0])}, where "
            f"a row of {ids.shape[1]} tokens does; no document goes on in the next row, so add it, "
            "or pass all documents in one row"
        )
    columns = torch.arange(num_tokens, device=ids.device)
    return torch.searchsorted(bounds, columns, right=True).view_as(ids)


def _shorten(bounds: Tensor) -> str:
    """Return numbers as a list, of many the first and the last."""
    numbers = bounds.tolist()
    if len(numbers) <= 8:
        return str(numbers)
    return f"[{', '.join(map(str, numbers[:6]))}, ..., {numbers[-1]}]"


def _find_restarts(
    positions: Tensor, num_before: Tensor, padding: Padding | None, *, has_table: bool
) -> Tensor:
    """Return where positions [B, T] start anew, [B, T] bool, real tokens first.

    A text may start at 0, or where the row's first does. Without a table of positions a row may
    start anywhere from what was read before it.

    Raises:
        InputError: for positions that go on elsewhere.
    """
    positions = positions if padding is None else padding.pack(positions)
    is_real = _find_real(positions, padding)
    first = positions[:, :1]
    counts_on = torch.ones_like(is_real)
    counts_on[:, 1:] = positions[:, 1:] == positions[:, :-1] + 1
    starts_anew = torch.zeros_like(is_real)
    starts_anew[:, 1:] = positions[:, 1:] <= positions[:, :-1]
    starts_anew &= (positions == 0) | ((positions == first) & (not has_table))
    ahead = first - num_before.unsqueeze(1)  # [B, 1]
    is_known = (counts_on | starts_anew) & ((ahead == 0) | ((ahead > 0) & (not has_table)))
    strange = (~is_known & is_real).nonzero()
    if len(strange):
        row, column = strange[0].tolist()
        raise InputError(
            "position_ids does not count the tokens of each row on from "
            f"{num_before.tolist()}, nor start a text anew at 0: real token {column} of row {row} "
            f"has {int(positions[row, column])}; leave it out, the model counts by itself, or let "
            "each text count from 0"
        )
    starts_anew[:, 0] = True
    return starts_anew & is_real


def _require_agreement(found: dict[str, Tensor], padding: Padding | None) -> None:
    """Raise ``InputError`` unless all marks start documents at the same tokens."""
    for name, starts in found.items():
        first = next(iter(found))
        differing = (starts != found[first]).nonzero()
        if len(differing):
            row, place = differing[0].tolist()
            column = place if padding is None else int(padding.order[row, place])
            one, other = (first, name) if bool(found[first][row, place]) else (name, first)
            raise InputError(
                f"{one} starts a document at column {column} of row {row}, and {other} does not; "
                "pass marks that say the same, or one of them"
            )


def _require_lengths(
    marks: Mapping[str, Any], starts: Tensor | None, ids: Tensor, padding: Padding | None
) -> None:
    """Raise ``InputError`` if a document is longer than the caller says the longest is."""
    said = {n: int(value) for n, value in marks.items() if n.startswith("max_length")}
    if not said:
        return
    longest = ids.shape[1]
    if starts is not None:
        is_real = _find_real(ids, padding)
        bounds = starts[is_real].nonzero().flatten()
        end = torch.tensor([int(is_real.sum())], device=bounds.device)
        longest = int(torch.diff(bounds, append=end).max()) if len(bounds) else 0
    for name, most in said.items():
        if most < longest:
            raise InputError(
                f"{name} is {most}, and the longest document has {longest} tokens; pass {longest}, "
                "with cu_seq_lens_q and cu_seq_lens_k, or leave both out"
            )


def refuse_stream(starts: Tensor, *, continues: bool, keeps: bool | None) -> None:
    """Raise ``InputError`` where a cache would have to go on with several documents of a row.

    Args:
        starts: from ``find_starts``.
        continues: whether there is a cache to go on from.
        keeps: whether the caller asks for the cache afterwards; ``None`` is not said.
    """
    if not continues and not keeps:
        return
    row, token = (starts[:, 1:]).nonzero()[0].tolist()
    name = "past_key_values" if continues else "use_cache=True"
    raise InputError(
        f"another document starts at token {token + 1} of row {row}, and {name} goes on with one "
        "text a row; leave it out, or give each document a row of its own, with attention_mask at "
        "padding"
    )


def refuse_documents(arguments: Mapping[str, Any]) -> None:
    """Raise ``InputError`` if arguments of ``generate`` mark documents in rows."""
    given = [name for name in DocumentMarks.__annotations__ if arguments.get(name) is not None]
    if given:
        raise InputError(
            f"generate goes on with one text a row, and {', '.join(given)} would mark documents "
            "in rows; leave them out, and give each text a row of its own"
        )
