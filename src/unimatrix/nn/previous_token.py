"""The feature of the previous real token, which the previous call's cache supplies at t = 0."""

import torch
from torch import Tensor


def shift_to_previous(features: Tensor, previous: Tensor | None) -> Tensor:
    """Return the features of position t - 1 at position t.

    Args:
        features: [B, T, *] of the current tokens.
        previous: [B, *] of the token before them; ``None`` is zero.

    Returns:
        [B, T, *], the dtype of ``features``.
    """
    if previous is None:
        previous = torch.zeros_like(features[:, 0])
    return torch.cat([previous.to(features.dtype).unsqueeze(1), features[:, :-1]], dim=1)


def take_last(features: Tensor, lengths: Tensor | None, previous: Tensor | None) -> Tensor:
    """Return the features of each row's last real token.

    Args:
        features: [B, T, *].
        lengths: [B] int64, real tokens of each row; ``None`` is T for all.
        previous: [B, *], kept where a row has no real token; ``None`` is zero.

    Returns:
        [B, *], the dtype of ``features``.
    """
    if lengths is None:
        return features[:, -1]
    index = (lengths - 1).clamp(min=0).view(-1, *[1] * (features.dim() - 1))
    last = features.gather(1, index.expand(-1, 1, *features.shape[2:])).squeeze(1)
    kept = torch.zeros_like(last) if previous is None else previous.to(last.dtype)
    return torch.where((lengths > 0).view(-1, *[1] * (last.dim() - 1)), last, kept)
