"""Reading by cosine, shared by the slots and the dense associative memory.

Both keep *entries* (key, value, perhaps a strength), choose a few of them for every query, and
weigh the chosen ones by a softmax. Choosing has no gradient, weighing has. The two are separate
here, because a choice must not depend on how a sum was ordered: every back end, every split of a
sequence and every device has to choose the same entries.

So choices are made on *decision units*: vectors divided by their norm in float64 and rounded to
multiples of 2^-26. A product of two components is then a multiple of 2^-52 and every partial sum
is below 2, so float64 computes the cosine of two units exactly, in any order and with or without
fused multiply-adds. Equal vectors give equal cosines, bit for bit. Against real arithmetic a
decision cosine is off by at most sqrt(C) 2^-26, below ``DECISION_EPSILON`` for C up to 4,096:
choices closer than that may go either way.
"""

import math

import torch
from torch import Tensor

# Absent from the paper's equation; published code, model/unimatrix.py:158.
LOGIT_SCALE = 8.0
MIN_NORM = 1e-12
UNIT_GRID = 2.0**-26
DECISION_EPSILON = 1e-6


def choose_compute_dtype(*tensors: Tensor) -> torch.dtype:
    """Return float64 if any tensor is float64, else float32."""
    is_double = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if is_double else torch.float32


def normalise(vectors: Tensor) -> Tensor:
    """Divide vectors [..., C] by max(norm, 1e-12), with gradient, in their own dtype."""
    # The norm of zeros has no second derivative, and nothing is read from what precedes a text.
    is_zero = (vectors == 0).all(dim=-1, keepdim=True)
    norm: Tensor = torch.linalg.vector_norm(vectors.masked_fill(is_zero, 1), dim=-1, keepdim=True)
    return vectors / norm.masked_fill(is_zero, 0).clamp_min(MIN_NORM)  # [..., C] by [..., 1]


def round_to_grid(numbers: Tensor) -> Tensor:
    """Round float64 ``numbers`` in place to multiples of 2^-26; NaN and infinity become 0."""
    numbers.div_(UNIT_GRID).round_().mul_(UNIT_GRID)
    return numbers.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)


def move_to_decisions(tensor: Tensor) -> Tensor:
    """Detach ``tensor`` and put it on a device that has float64."""
    detached = tensor.detach()
    return detached.cpu() if detached.device.type == "mps" else detached


def compute_decision_norms(vectors: Tensor) -> Tensor:
    """Return what decision units are divided by, max(norm, 1e-12), [..., 1] in float64.

    Args:
        vectors: [..., C], any float.
    """
    wide = move_to_decisions(vectors).contiguous()
    norm: Tensor = torch.linalg.vector_norm(wide, dim=-1, keepdim=True, dtype=torch.float64)
    return norm.clamp_min(MIN_NORM)


def compute_decision_units(vectors: Tensor) -> Tensor:
    """Return the units that choices are made on.

    Args:
        vectors: [..., C], any float; not modified.

    Returns:
        [..., C] float64 without gradient, contiguous, multiples of 2^-26.
    """
    # The grid is a power of two, so dividing by norm and grid at once rounds no differently.
    units = move_to_decisions(vectors).double() / (compute_decision_norms(vectors) * UNIT_GRID)
    return units.round_().mul_(UNIT_GRID).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0).contiguous()


def take_rows(index: Tensor, *entries: Tensor) -> tuple[Tensor, ...]:
    """Gather ``field[b, index[b, ...]]`` from every field.

    Args:
        index: [B, ...] int64, in [0, P).
        entries: [B, P, ...] each.

    Returns:
        for each field, the shape of ``index`` followed by that of one entry.
    """
    batch, num_entries = entries[0].shape[:2]
    flat = index
    if batch > 1:
        first = torch.arange(0, batch * num_entries, num_entries, device=index.device)  # [B]
        flat = index + first.view(-1, *[1] * (index.dim() - 1))
    flat = flat.reshape(-1)
    return tuple(
        field.flatten(0, 1).index_select(0, flat).view(*index.shape, *field.shape[2:])
        for field in entries
    )


def read_chosen(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    log_strength: Tensor | None,
    chosen: Tensor,
) -> tuple[Tensor, Tensor]:
    """Weigh the chosen entries of each position by a softmax and sum their values.

    Args:
        queries: [B, T, C], float32 or float64.
        keys: [B, P, C].
        values: [B, P, Dv].
        log_strength: [B, P] in nats, added to the score; ``None`` adds nothing.
        chosen: [B, T, K] int64, entries of each position, -1 where there are fewer.

    Returns:
        context [B, T, Dv] and weights [B, T, K]; 0 where nothing is chosen.

    Note:
        Gathers K entries a position, so O(B T K (C + Dv)) time and memory. Differentiable in all
        floating arguments.
    """
    exists = chosen >= 0  # [B, T, K]
    rows = chosen.clamp_min(0)
    units, held = take_rows(rows, normalise(keys), values)  # [B, T, K, C], [B, T, K, Dv]
    score = (units * normalise(queries).unsqueeze(2)).sum(-1) / math.sqrt(keys.shape[-1])
    if log_strength is not None:
        score = score + take_rows(rows, log_strength)[0]  # [B, T, K]
    logits = (LOGIT_SCALE * score).masked_fill(~exists, torch.finfo(score.dtype).min)
    weights = torch.softmax(logits, dim=-1) * exists  # [B, T, K]
    context = (weights.unsqueeze(-1) * held).sum(2)  # [B, T, Dv]
    return context, weights
