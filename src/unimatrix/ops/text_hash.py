"""One number for all the token ids that a row has read, kept as the row goes on."""

import torch
from torch import Tensor

MULTIPLIER = 6_364_136_223_846_793_005
"""Odd, of 63 bits; the hash of a text is a polynomial in it, modulo 2^64."""
START = 1
"""The hash of no token: not 0, so that leading zeros count."""


def hash_text(token_ids: Tensor, lengths: Tensor | None, before: Tensor) -> Tensor:
    """Return the hash of each row after more tokens: ``MULTIPLIER * hash + id`` for each of them.

    A text has one hash, in whatever parts it is read; two texts have the same by chance once in
    2^64. It is no protection against texts that are made to collide.

    Args:
        token_ids: [B, T] int64, the real ones of each row first.
        lengths: [B] int64, real tokens of each row; ``None`` is T for all.
        before: [B] int64, the hash of what each row has read; ``START`` where it is nothing.

    Returns:
        [B] int64.
    """
    num_tokens = token_ids.shape[1]
    if num_tokens == 1 and lengths is None:
        return torch.add(token_ids[:, 0], before, alpha=MULTIPLIER)
    # Products and sums of 64-bit integers wrap around, on every device.
    powers = before.new_full((num_tokens + 1,), MULTIPLIER)
    powers[0] = 1
    powers = powers.cumprod(0)
    if lengths is None:
        return before * powers[-1] + (token_ids * powers[:-1].flip(0)).sum(dim=1)
    exponents = lengths.unsqueeze(1) - 1 - torch.arange(num_tokens, device=before.device)  # [B, T]
    terms = torch.where(exponents >= 0, token_ids * powers[exponents.clamp(min=0)], 0)
    return before * powers[lengths] + terms.sum(dim=1)
