"""The loss: which positions it needs, cross entropy in nats, and the scale of hindsight."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from unimatrix.errors import InputError
from unimatrix.modeling_inputs import require_shape, take_targets
from unimatrix.nn.pointer_mixture import MixedLogits, score_targets

IGNORED_LABEL = -100


def compute_loss(
    predicted: Tensor | MixedLogits,
    targets: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Return the mean cross entropy in nats.

    Computed in the dtype of the logits, so that float64 stays float64; 16-bit logits are raised to
    float32.

    Args:
        predicted: logits [..., V], or those of a mixture, of which only the targets are computed.
        targets: [...] int64, -100 ignored.
        num_items_in_batch: divisor instead of the number of targets here, or of their weights.
        weights: [...], by which the target of each position counts; ``None`` is 1.

    Raises:
        InputError: for a target that is no token and not -100; a GPU ends the process's work
            instead.
    """
    try:
        return _compute_loss(predicted, targets, num_items_in_batch, weights)
    except (IndexError, RuntimeError) as error:  # torch has looked at every target
        vocab = (predicted[0] if isinstance(predicted, MixedLogits) else predicted).shape[-1]
        is_strange = (targets != IGNORED_LABEL) & ((targets < 0) | (targets >= vocab))
        if not is_strange.any():
            raise
        raise InputError(
            f"label {int(targets[is_strange][0])} is no token of the vocabulary; pass 0 to "
            f"{vocab - 1}, or {IGNORED_LABEL} where no loss is wanted"
        ) from error


def count_targets(targets: Tensor, weights: Tensor | None) -> Tensor:
    """Return how many targets there are, or the sum of their weights; -100 is none."""
    counted = targets != IGNORED_LABEL
    return counted.sum() if weights is None else (weights * counted).sum()


def _compute_loss(
    predicted: Tensor | MixedLogits,
    targets: Tensor,
    num_items_in_batch: Tensor | int | None,
    weights: Tensor | None,
) -> Tensor:
    """Compute the loss; arguments as in ``compute_loss``."""
    targets = targets.flatten()
    weights = None if weights is None else weights.flatten().to(targets.device)
    divisor = num_items_in_batch
    if isinstance(predicted, MixedLogits):
        counted = targets != IGNORED_LABEL
        rows = (raise_precision(part).flatten(0, -2) for part in predicted)
        losses = score_targets(MixedLogits(*rows), targets.masked_fill(~counted, 0))
        losses = torch.where(counted, losses, 0.0)
    else:
        flat = raise_precision(predicted).flatten(0, -2), targets.to(predicted.device)
        if weights is None and divisor is None:
            return cross_entropy(*flat, ignore_index=IGNORED_LABEL)
        losses = cross_entropy(*flat, ignore_index=IGNORED_LABEL, reduction="none")
    if weights is not None:
        losses = losses * weights
    return losses.sum() / (count_targets(targets, weights) if divisor is None else divisor)


def add_scale(
    loss: Tensor,
    scale: tuple[Tensor, Tensor],
    targets: Tensor,
    num_items_in_batch: Tensor | int | None,
    weights: Tensor | None = None,
) -> Tensor:
    """Add the two zeros of ``ops.hindsight`` to the loss, each times what it counts.

    Args:
        loss: the mean cross entropy.
        scale: from ``watch_reads``.
        targets: int64, -100 ignored.
        num_items_in_batch, weights: as the loss was given.
    """
    num_targets = (targets != IGNORED_LABEL).sum()
    divisor = num_items_in_batch
    divisor = count_targets(targets, weights) if divisor is None else divisor
    of_target, of_gate = scale
    return loss + of_target / divisor + of_gate * (num_targets / divisor)


def ignore_padding(targets: Tensor, attention_mask: Tensor) -> Tensor:
    """Return the targets of real positions alone: what padding predicts is no model's doing.

    Args:
        targets: [B, T] int64, the target of each position.
        attention_mask: [B, T] or [B, past + T], 0 at padding.
    """
    return targets.masked_fill(attention_mask[:, -targets.shape[1] :] == 0, IGNORED_LABEL)


def ignore_starts(targets: Tensor, starts: Tensor) -> Tensor:
    """Return targets [B, T] without first tokens: no document predicts the next one.

    Args:
        targets: labels, or each token's next one.
        starts: [B, T] bool, where a target is the first token of a document.
    """
    return targets.masked_fill(starts.to(targets.device), IGNORED_LABEL)


def ignore_unpredicted(
    targets: Tensor, attention_mask: Tensor | None, starts: Tensor | None
) -> Tensor:
    """Return targets [B, T] without those that no token before them predicts.

    Args:
        targets: the target of each position.
        attention_mask: as in ``ignore_padding``; ``None`` is no padding.
        starts: [B, T] bool, the first token of each document; ``None`` is one document a row.
    """
    if attention_mask is not None:
        targets = ignore_padding(targets, attention_mask)
    if starts is not None:
        # The last token, to which the first start is rolled, has no target.
        targets = ignore_starts(targets, starts.roll(-1, dims=1))
    return targets


def choose_targets(
    labels: Tensor | None,
    shift_labels: Tensor | None,
    weights: Tensor | None,
    tokens: Tensor | None,
    logits_to_keep: int | Tensor,
) -> Tensor | None:
    """Return the target of each position, [B, T] int64, -100 ignored; ``None`` without labels.

    Args:
        labels: [B, T], shifted here.
        shift_labels: [B, T], targets already; takes precedence over ``labels``.
        weights: by which each target counts, one value a target; ``None`` is 1.
        tokens: [B, T] or [B, T, D]; for any other shape the model raises, and nothing is chosen.
        logits_to_keep: of a few positions, the targets of those are enough.

    Raises:
        InputError: for labels or weights of another shape, labels that are no whole numbers, or
            weights alone.
    """
    has_rows = isinstance(tokens, Tensor) and tokens.dim() > 1
    if labels is None and shift_labels is None and weights is not None:
        raise InputError("loss_weights are given without labels, which they would weigh; pass both")
    if not has_rows or (labels is None and shift_labels is None):
        return None
    assert tokens is not None
    shape = list(tokens.shape[:2])
    keeps_some = isinstance(logits_to_keep, Tensor) or bool(logits_to_keep)
    labels = take_targets("labels", labels, shape)
    targets = take_targets("shift_labels", shift_labels, None if keeps_some else shape)
    if targets is None:
        assert labels is not None
        targets = pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)
    require_shape("loss_weights", weights, list(targets.shape))
    return targets


def choose_positions(
    targets: Tensor | None,
    logits_at: Tensor | None,
    logits_to_keep: int | Tensor,
    shape: Sequence[int],
) -> tuple[Any, ...] | None:
    """Return the index of the positions whose logits are needed, ``None`` for all.

    Args:
        targets: [B, T] int64, where only the loss is wanted; ``None`` is logits.
        logits_at: [B, T] bool, the positions that the caller marks.
        logits_to_keep: so many last positions, 0 for all, or [n] int64, the positions themselves.
        shape: [B, T].

    Raises:
        InputError: for marks of another shape.
    """
    if targets is not None:
        return _choose_counted(targets)
    if logits_at is not None:
        require_shape("logits_at", logits_at, list(shape))
        return (logits_at,)
    if isinstance(logits_to_keep, Tensor):
        return (slice(None), logits_to_keep)
    return (slice(None), slice(-logits_to_keep, None)) if logits_to_keep else None


def _choose_counted(targets: Tensor) -> tuple[Any, ...]:
    """Return the index of the positions whose logits a loss needs.

    Where most have a target, all: picking positions out, and putting their gradients back, takes
    longer than the logits of the others.
    """
    if torch.compiler.is_compiling():
        return (slice(None),)  # How many there are would break the graph.
    counted = targets != IGNORED_LABEL
    if targets.device.type == "cpu" and 2 * int(counted.sum()) > targets.numel():
        return (slice(None),)
    return (counted,)


def raise_precision(logits: Tensor) -> Tensor:
    """Return 16-bit floats as float32; ids and wider floats as they are."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
