"""Keys and values of the last tokens of streams, kept from call to call for speed alone."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from unimatrix.ops.indexed_attention import REACH, Entries

MOST_NEW = 4096
"""Tokens of a call for which a ring has room."""
_LEAST_NEW = 256
"""A ring is made for so many tokens; around the places of fewer, making the keys costs less."""
_MOST_BYTES = 2**26

MakeKeys = Callable[[Tensor], tuple[Tensor, Tensor]]


class KeyRing(NamedTuple):
    """What ``make_keys`` makes of the last R tokens of each stream; nothing that is saved.

    Attributes:
        keys: [B, 2 R, H, C]; token n has the rows 2 (n mod R) and 2 (n mod R) + 1.
        values: [B, R, H, C].
        num_tokens: [B] int64, tokens of each stream so far.
        weights: what they were made with.
    """

    keys: Tensor
    values: Tensor
    num_tokens: Tensor
    weights: tuple[tuple[int, int], ...]

    def place(self, entries: Entries, num_tokens: Tensor, num_columns: int) -> Entries:
        """Return entries of a text as those of the ring.

        Args:
            entries: whose rows are those of a text [B, S].
            num_tokens: [B] int64, tokens of each stream before the last T columns of the text.
            num_columns: S - T, columns of the text before these.
        """
        size = self.values.shape[1]
        shift = (2 * (num_tokens - num_columns) % (2 * size)).int().view(-1, 1, 1)
        rows = (entries.rows + shift) % (2 * size)
        return entries._replace(rows=rows.where(entries.rows >= 0, -1))


_rings = WeakTensorKeyDictionary()
"""By the tensor of the tokens that an index carries: a copy of the index has no ring. A ring goes
to the index of the last call alone: others of the same text may go on with other tokens."""


def _tells_nothing(weight: Tensor) -> bool:
    """Return whether a weight has no version, or lies elsewhere until its module is called."""
    return weight.is_inference() or weight.is_meta


def _describe(weights: list[Tensor]) -> tuple[tuple[int, int], ...] | None:
    """Return what tells weights from others, and from the same ones changed in place.

    ``None`` for weights that neither address nor version tells: sharded, quantised or fake ones,
    and those of inference mode.
    """
    if any(type(w) not in (Tensor, nn.Parameter) or _tells_nothing(w) for w in weights):
        return None
    return tuple((weight.data_ptr(), weight._version) for weight in weights)


def _take_ring(
    carried: Tensor | None, num_before: Tensor, weights: tuple[tuple[int, int], ...]
) -> KeyRing | None:
    """Return the ring of an index, which has it no more, if it can go on here."""
    if carried is None or carried not in _rings:
        return None
    ring: KeyRing = _rings[carried]
    del _rings[carried]
    if ring.num_tokens.device != num_before.device or ring.weights != weights:
        return None
    # What inference mode has made cannot be changed outside of it.
    if ring.keys.is_inference() and not torch.is_inference_mode_enabled():
        return None
    return ring if torch.equal(ring.num_tokens, num_before) else None


def extend_ring(
    text: Tensor,
    num_before: Tensor,
    num_new: int,
    window: int,
    width: int,
    carried: Tensor | None,
    weights: list[Tensor],
    make_keys: MakeKeys,
) -> KeyRing | None:
    """Return the ring of streams after more tokens, ``None`` where none is worth its memory.

    Args:
        text: [B, W + T] int64, the tokens remembered before and T new ones; or [B, T], the first.
        num_before: [B] int64, tokens of each stream before the new ones.
        num_new: T.
        window: W.
        width: H C, numbers of a key and of a value.
        carried: the tokens of the index before these, whose ring goes on.
        weights: that make keys and values.
        make_keys: takes tokens [B, S], returns keys [B, 2 S, H, C] and values [B, S, H, C].
    """
    size = window + MOST_NEW
    # Before anything is made: keys of a million tokens take a minute.
    num_bytes = len(text) * size * 3 * width * weights[0].element_size()
    if num_new > MOST_NEW or num_bytes > _MOST_BYTES:
        return None
    described = _describe(weights)
    if described is None:
        return None
    ring = _take_ring(carried, num_before, described)
    if ring is None and num_new < _LEAST_NEW:
        return None
    known = text.shape[1] - num_new
    first = 0 if ring is None else max(0, known - 2 * REACH + 1)
    keys, values = make_keys(text[:, first:])
    # Of the first tokens of a piece those before are not seen; their keys are there already.
    skipped = 0 if first == 0 else REACH
    keys, values = keys[:, 2 * skipped :], values[:, skipped:]
    if ring is None:
        ring = _start_ring(keys, values, size)
    columns = torch.arange(first + skipped - known, num_new, device=text.device)
    columns = (num_before.unsqueeze(1) + columns) % size  # [B, S]
    rows = torch.stack([2 * columns, 2 * columns + 1], dim=-1).flatten(1)
    batch = torch.arange(len(text), device=text.device).unsqueeze(1)
    ring.keys[batch, rows] = keys.to(ring.keys.dtype)
    ring.values[batch, columns] = values.to(ring.values.dtype)
    return ring._replace(weights=described)


def keep_ring(ring: KeyRing, carried: Tensor, num_tokens: Tensor) -> None:
    """Keep a ring for the streams whose index carries these tokens now.

    Args:
        ring: after the last call.
        carried: the tokens of the index.
        num_tokens: [B] int64, tokens of each stream now.
    """
    _rings[carried] = ring._replace(num_tokens=num_tokens)


def _start_ring(keys: Tensor, values: Tensor, size: int) -> KeyRing:
    batch, _, *heads = values.shape
    shape = (batch, size, *heads)
    empty = keys.new_zeros(batch, 2 * size, *heads)
    return KeyRing(empty, values.new_zeros(shape), torch.zeros(batch, dtype=torch.int64), ())
