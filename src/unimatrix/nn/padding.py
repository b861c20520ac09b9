"""Real tokens first: the one place that knows where padding was."""

from typing import NamedTuple

import torch
from torch import Tensor

from unimatrix.errors import InputError


class Padding(NamedTuple):
    """Where the real tokens of a padded batch are.

    Everything behind the embedding sees rows that start with their real tokens, so that "the
    previous token" is the previous column and padding can only trail.

    Attributes:
        order: [B, T] int64, columns with the real tokens first, in their order.
        mask: [B, T] bool, True at real tokens.
        lengths: [B] int64, real tokens of each row.
    """

    order: Tensor
    mask: Tensor
    lengths: Tensor

    def pack(self, features: Tensor) -> Tensor:
        """Return ids or features [B, T, *] with the real tokens of each row first."""
        shape = (*self.order.shape, *[1] * (features.dim() - 2))
        return features.gather(1, self.order.view(shape).expand_as(features))

    def unpack(self, features: Tensor) -> Tensor:
        """Return features [B, T, *] in the caller's columns, zero at padding."""
        shape = (*self.order.shape, *[1] * (features.dim() - 2))
        inverse = self.order.argsort(dim=1).view(shape).expand_as(features)
        # Chosen, not multiplied: what stands at padding may be infinite.
        return torch.where(self.mask.view(shape), features.gather(1, inverse), 0)


def find_padding(
    attention_mask: Tensor | None, input_ids: Tensor, num_past: int = 0
) -> Padding | None:
    """Return where the padding is, ``None`` where there is none.

    Args:
        attention_mask: as in ``cut_mask``; ``None`` is no padding.
        input_ids: [B, T] int64.
        num_past: columns of the cache before them.

    Raises:
        InputError: as in ``cut_mask``.
    """
    if attention_mask is None:
        return None
    mask = cut_mask(attention_mask, input_ids, num_past)
    if bool(mask.all()):
        return None
    order = torch.argsort((~mask).to(torch.int8), dim=1, stable=True)
    return Padding(order, mask, mask.sum(dim=1))


def cut_mask(attention_mask: Tensor, input_ids: Tensor, num_past: int) -> Tensor:
    """Return which of ``input_ids`` are real, [B, T] bool.

    Args:
        attention_mask: [B, T] or [B, past + T], 0 at padding; the last T columns count.
        input_ids: [B, T] int64.
        num_past: columns of the cache before them.

    Raises:
        InputError: if the mask's shape is neither.
    """
    batch, num_columns = input_ids.shape
    shapes = [[batch, num_columns], [batch, num_past + num_columns]]
    if list(attention_mask.shape) not in shapes:
        beside = f", or {shapes[1]} to cover the cache's {num_past} columns" if num_past else ""
        raise InputError(
            f"attention_mask has shape {list(attention_mask.shape)}; pass {shapes[0]}, one value "
            f"per token of input_ids{beside}"
        )
    return attention_mask[:, -num_columns:].to(input_ids.device).bool()


def align_right(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Move the padding of each row to its left, so that the last column is real in all of them.

    Args:
        input_ids: [B, T].
        attention_mask: [B, T] bool.

    Returns:
        ids and mask, [B, T] each.

    Raises:
        InputError: if a row has no real token.
    """
    empty = (~attention_mask.any(dim=1)).nonzero().flatten().tolist()
    if empty:
        raise InputError(
            f"rows {empty} of input_ids hold no token to go on from; give each at least one, for "
            "instance BOS, and mark it in attention_mask"
        )
    if bool(attention_mask[:, -1].all()):
        return input_ids, attention_mask
    order = torch.argsort(attention_mask.to(torch.int8), dim=1, stable=True)
    return input_ids.gather(1, order), attention_mask.gather(1, order)
