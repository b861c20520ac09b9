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


def find_padding(attention_mask: Tensor | None, input_ids: Tensor) -> Padding | None:
    """Return where the padding is, ``None`` where there is none.

    Args:
        attention_mask: [B, T] or [B, past + T], 0 at padding; the last T columns count.
        input_ids: [B, T] int64.

    Raises:
        InputError: if the mask's shape fits neither.
    """
    if attention_mask is None:
        return None
    batch, num_columns = input_ids.shape
    if attention_mask.dim() != 2 or attention_mask.shape[0] != batch:
        raise InputError(
            f"attention_mask has shape {list(attention_mask.shape)}; pass [{batch}, {num_columns}] "
            f"or, beside a cache, [{batch}, past + {num_columns}]"
        )
    if attention_mask.shape[1] < num_columns:
        raise InputError(
            f"attention_mask covers {attention_mask.shape[1]} columns and input_ids has "
            f"{num_columns}; pass one mask value per token"
        )
    mask = attention_mask[:, -num_columns:].to(input_ids.device).bool()
    if bool(mask.all()):
        return None
    order = torch.argsort((~mask).to(torch.int8), dim=1, stable=True)
    return Padding(order, mask, mask.sum(dim=1))
