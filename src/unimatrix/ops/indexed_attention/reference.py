"""Attention around places by its definition."""

import torch
from torch import Tensor
from torch.nn.functional import conv1d, pad, softplus

from unimatrix.ops.indexed_attention.entries import (
    BEFORE,
    MOST_MATCHED,
    NUM_OFFSETS,
    REACH,
    Entries,
)


def find_entries_reference(text: Tensor, distances: Tensor, window: int) -> Entries:
    """Return the entries of every position; see ``find_entries``."""
    batch, num_tokens, num_places = distances.shape
    num_columns = text.shape[1]
    now = torch.arange(num_columns - num_tokens, num_columns, device=text.device).view(1, -1, 1, 1)
    offsets = torch.arange(-BEFORE, NUM_OFFSETS - BEFORE, device=text.device)
    columns = now - distances.unsqueeze(-1) + offsets  # [B, T, P, O]
    exists = (distances.unsqueeze(-1) >= 0) & (columns >= 0) & (columns <= now)
    exists &= now - columns < window - MOST_MATCHED
    shape = (batch, num_tokens, num_places * NUM_OFFSETS)

    def read(at: Tensor) -> Tensor:
        """Return the tokens in columns, -1 outside the text."""
        found = text.gather(1, at.clamp_min(0).flatten(1)).view(at.shape)
        return found.masked_fill(at < 0, -1)

    columns = columns.where(exists, -1)
    tokens = read(columns)
    exists &= tokens >= 0
    matched, goes_on = torch.zeros_like(columns), exists
    for length in range(MOST_MATCHED):
        before = read(columns - 1 - length)
        goes_on = goes_on & (before >= 0) & (before == read((now - length).expand_as(columns)))
        matched += goes_on
    rows = 2 * columns + (columns + REACH - 1 <= now)
    found = (rows.where(exists, -1).int(), matched.int(), tokens.where(exists, 0))
    return Entries(*(part.reshape(shape) for part in found))


def share_reference(scores: Tensor, head_scores: Tensor, weights: Tensor) -> Tensor:
    """Return ln of the shares; see ``share_heads``."""
    log_sum = _sum_components(scores, head_scores, weights)
    # No product of matrices, whose 16 bits under autocast would not sum to 1.
    shares = ((head_scores - log_sum).exp().unsqueeze(-1) * weights).sum(dim=-2)
    return torch.cat([scores - log_sum, _log(shares)], dim=-1)


def share_targets_reference(
    scores: Tensor,
    head_scores: Tensor,
    weights: Tensor,
    other_ids: Tensor,
    token_ids: Tensor,
    targets: Tensor,
) -> Tensor:
    """Return ln of the shares of the vocabulary and the targets; see ``share_targets``."""
    log_sum = _sum_components(scores, head_scores, weights)
    target = targets.unsqueeze(-1)
    of_others = ((scores[..., 1:] - log_sum).exp() * (other_ids == target)).sum(dim=-1)
    matched = (weights * (token_ids == target).unsqueeze(-2)).sum(dim=-1)  # [B, T, H]
    of_heads = ((head_scores - log_sum).exp() * matched).sum(dim=-1)
    return torch.stack([(scores - log_sum)[..., 0], _log(of_others + of_heads)], dim=-1)


def _sum_components(scores: Tensor, head_scores: Tensor, weights: Tensor) -> Tensor:
    """Return ln of what all components weigh together, [B, T, 1]."""
    of_heads = head_scores + _log(weights.sum(dim=-1))
    return torch.cat([scores, of_heads], dim=-1).logsumexp(dim=-1, keepdim=True)


def _log(x: Tensor) -> Tensor:
    """Return ln, -inf without a gradient for 0."""
    exists = x > 0
    return x.where(exists, 1).log().masked_fill(~exists, -torch.inf)


def sum_around_reference(features: Tensor, kernels: Tensor, rows: Tensor | None) -> Tensor:
    """Return weighted sums around tokens; see ``sum_around``."""
    channels, width = features.transpose(1, 2), features.shape[-1]
    past, ahead = (kernel.unsqueeze(1) for kernel in kernels)  # [D, 1, 12] each
    seen = conv1d(pad(channels, (REACH, -1)), past, groups=width)
    known = seen + conv1d(pad(channels, (0, REACH - 1)), ahead, groups=width)
    both = torch.stack([seen, known], dim=-1).permute(0, 2, 3, 1).reshape(-1, width)
    return both if rows is None else both[rows]


def attend_reference(
    entries: Entries,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    offset_bias: Tensor,
    place_bias: Tensor,
    match_bias: Tensor,
    boundary: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return context and weights; see ``attend_entries``."""
    rows = entries.rows.clamp_min(0).long()  # [B, T, E]
    streams = torch.arange(len(rows), device=rows.device).view(-1, 1, 1)
    read = values[streams, rows // 2]  # [B, T, E, H, C]
    scores = torch.einsum("bthc,btehc->bthe", query, keys[streams, rows])
    offsets = torch.arange(rows.shape[2], device=rows.device)
    scores = scores + offset_bias[..., offsets % NUM_OFFSETS]
    scores = scores + place_bias[..., offsets // NUM_OFFSETS]
    scores = scores + match_bias[:, entries.matched.long()].permute(1, 2, 0, 3)
    if boundary is not None:
        scores = scores - sum_boundaries(read, entries.rows >= 0, boundary)
    scores = scores.masked_fill((entries.rows < 0).unsqueeze(2), -torch.inf)
    nothing = torch.zeros_like(scores[..., :1])
    weights = torch.cat([nothing, scores], dim=-1).softmax(dim=-1)[..., 1:]
    context = torch.einsum("bthe,btehc->bthc", weights, read)
    return context, weights


def sum_boundaries(read: Tensor, exists: Tensor, boundary: Tensor) -> Tensor:
    """Return the boundaries between each entry and its place, [B, T, H, E].

    Args:
        read: [B, T, E, H, C], the values of the entries.
        exists: [B, T, E] bool.
        boundary: [H, 2 C + 1].
    """
    width = read.shape[-1]
    own, before, bias = boundary[:, :width], boundary[:, width:-1], boundary[:, -1]
    by_place = (read * exists[..., None, None]).view(
        *read.shape[:2], -1, NUM_OFFSETS, *read.shape[3:]
    )
    last = pad(by_place, (0, 0, 0, 0, 1, -1))
    levels = softplus((by_place * own + last * before).sum(dim=-1) + bias)  # [B, T, P, 80, H]
    levels = levels * exists.view(*exists.shape[:2], -1, NUM_OFFSETS, 1)
    ahead = levels[..., BEFORE + 1 :, :].cumsum(dim=3)
    behind = levels[..., 1 : BEFORE + 1, :].flip(3).cumsum(dim=3).flip(3)
    crossed = torch.cat([behind, torch.zeros_like(ahead[..., :1, :]), ahead], dim=3)
    return crossed.flatten(2, 3).transpose(2, 3)
