"""Output head and cross entropy in Numba: losses and gradients in one pass over the rows.

As in ``feed_forward_native``, each thread takes a few rows at a time through all layers. The
gradient of a sum has the same factor for every row, which is known only later: the forward pass
computes the gradients but for this factor. So logits and their gradients are in memory for a few
rows only.
"""
# mypy: allow-untyped-defs

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from unimatrix.errors import InputError
from unimatrix.kernels.passes.weights import PassWeights, join_weights, order_panels
from unimatrix.ops.numba.compile import kernel, part
from unimatrix.ops.numba.lanes import (
    OPTIONS,
    at,
    exponential,
    keep,
    larger,
    largest,
    load,
    plus,
    pointer,
    store,
    times,
    total,
    zeros,
)
from unimatrix.ops.numba.products import LANES, multiply
from unimatrix.ops.numba.threads import run_rows
from unimatrix.ops.numba.tiles import TILE, count_spans, sum_spans
from unimatrix.ops.operator import declare_operator

_FAR_BELOW = -1e30
"""A logit without weight, finite in float32."""


class _HeadForm(NamedTuple):
    """Options of the kernel as tuples, since Numba compiles a kernel for their lengths."""

    lanes: tuple[int, ...]
    mixes: tuple[int, ...]  # empty: shares are votes, added to logits
    weighs: tuple[int, ...]  # empty: every target counts the same
    saves: tuple[int, ...]  # empty: no gradients


class HeadSizes(NamedTuple):
    """Sizes of the row of weights, the head's [V, D].

    Attributes:
        vocab: V.
        width: D, a multiple of the kernel's lanes.
    """

    vocab: int
    width: int


def prepare_head(weight: Tensor) -> PassWeights:
    """Prepare the head's weight [V, D]; D is a multiple of the kernel's lanes."""
    sizes = HeadSizes(*weight.shape)
    return join_weights([weight], order_panels(((0, *sizes),)), sizes)


@part(**OPTIONS)
def _score_row(
    form, logits, vocab, columns, target, weight, token_ids, shares, num_pointed, dshares
):  # fmt: skip
    """Return a row's loss times its weight; overwrite its logits by their gradients, and set those
    of the shares.
    """
    lanes, W = form.lanes, len(form.lanes)
    if len(form.mixes) == 0:
        for k in range(num_pointed):
            logits[token_ids[k]] += shares[k]
    for j in range(vocab, columns):
        logits[j] = _FAR_BELOW
    tops = load(logits, 0, lanes)
    for j in range(W, columns, W):
        tops = larger(tops, load(logits, j, lanes))
    top = largest(tops)
    target_logit, sums = logits[target] - top, zeros(logits, lanes)
    for j in range(0, columns, W):
        powers = exponential(plus(load(logits, j, lanes), -top))
        store(logits, j, powers)
        sums = plus(sums, powers)
    power_sum = total(sums)
    nats = math.log(power_sum) - target_logit
    share = power_sum / power_sum  # 1 in the type of the logits
    if len(form.mixes):
        log_vocab = shares[0] - nats  # ln of the vocabulary's part of the target's probability
        best = log_vocab
        for k in range(num_pointed):
            if token_ids[k] == target:
                best = max(best, shares[1 + k])
        likelihood = math.exp(log_vocab - best)
        for k in range(num_pointed):
            if token_ids[k] == target:
                likelihood += math.exp(shares[1 + k] - best)
        nats = -(best + math.log(likelihood))
        share = math.exp(log_vocab - best) / likelihood
        if len(form.saves):
            dshares[0] = -share * weight
            for k in range(num_pointed):
                dshares[1 + k] = 0
                if token_ids[k] == target:
                    dshares[1 + k] = -math.exp(shares[1 + k] - best) / likelihood * weight
    if len(form.saves):
        share *= weight
        for j in range(0, columns, W):
            store(logits, j, times(load(logits, j, lanes), share / power_sum))
        logits[target] -= share
        if len(form.mixes) == 0:
            for k in range(num_pointed):
                dshares[k] = logits[token_ids[k]]
    return nats * weight


@kernel(**OPTIONS)
def _score_spans(
    first, last, form, num_spans, num_rows, vocab, width, num_pointed, ignored,
    h, panels, targets, weights, token_ids, shares, dh, dshares, grads, sums,
):  # fmt: skip
    lanes, D, K, W = form.lanes, width, num_pointed, len(form.lanes)
    S = K + len(form.mixes)
    V = (vocab + W - 1) // W * W
    across = pointer(panels, 0)
    matrix = at(across, D * V)
    logits_row = V + W  # rows no power of two apart
    scratch = np.empty(TILE * logits_row, h.dtype)
    logits = pointer(scratch, 0)
    for span in range(first, last):
        if len(form.saves):
            grads[span * vocab * D : (span + 1) * vocab * D] = 0
        nats, num_invalid = 0.0, 0
        end = (span + 1) * num_rows // num_spans
        for start in range(span * num_rows // num_spans, end, TILE):
            rows = min(TILE, end - start)
            source = pointer(h, start * D)
            multiply(lanes, source, D, 1, across, D * W, W, logits, logits_row, rows, V, D, False)
            for row in range(rows):
                target, row_logits = targets[start + row], at(logits, row * logits_row)
                if 0 <= target < vocab:
                    weight = h.dtype.type(1)
                    if len(form.weighs):
                        weight = weights[start + row]
                    nats += _score_row(
                        form, row_logits, vocab, V, target, weight,
                        pointer(token_ids, (start + row) * K), pointer(shares, (start + row) * S),
                        K, pointer(dshares, (start + row) * S),
                    )  # fmt: skip
                    continue
                num_invalid += target != ignored
                for j in range(0, V, W):
                    store(row_logits, j, zeros(row_logits, lanes))
                if len(form.saves):
                    dshares[(start + row) * S : (start + row + 1) * S] = 0
            if len(form.saves):
                multiply(
                    lanes, logits, logits_row, 1, matrix, vocab * W, W,
                    pointer(dh, start * D), D, rows, D, vocab, False,
                )  # fmt: skip
                multiply(
                    lanes, logits, 1, logits_row, source, W, D,
                    pointer(grads, span * vocab * D), D, vocab, D, rows, True,
                )  # fmt: skip
        sums[2 * span], sums[2 * span + 1] = nats, num_invalid
    keep(scratch)


def _require_rows(name: str, ids: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ``InputError`` unless ids have the shape and type that the kernel reads."""
    if ids.shape != shape or ids.dtype != torch.int64:
        raise InputError(f"{name} is {list(ids.shape)} {ids.dtype}; pass {list(shape)} torch.int64")


def run_forward(
    h: Tensor, row: Tensor, panels: Tensor, sizes: Sequence[int], targets: Tensor,
    token_ids: Tensor | None, shares: Tensor | None, target_weights: Tensor | None, ignored: int,
    *, saves: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Run the kernel.

    Args:
        h, targets, token_ids, shares, target_weights, ignored: as in ``sum_cross_entropy_native``.
        row, panels, sizes: fields of ``PassWeights``.
        saves: return gradients; else they are empty.

    Returns:
        the sum of the losses, and its gradients by h, by the row of weights and by the shares.

    Raises:
        InputError: for a target that is neither a token nor ``ignored``, or another shape or type.
    """
    _require_rows("targets", targets, h.shape[:-1])
    if token_ids is not None:
        _require_rows("token_ids", token_ids, (*h.shape[:-1], token_ids.shape[-1]))
    vocab, num_rows = sizes[0], h.numel() // h.shape[-1]
    num_spans = count_spans(-(-num_rows // TILE))
    work = (3 if saves else 1) * num_rows * row.numel() // num_spans
    num_pointed = 0 if token_ids is None else token_ids.shape[-1]
    mixes = shares is not None and shares.shape[-1] > num_pointed
    weighs = target_weights is not None
    form, none = _HeadForm(LANES, (0,) * mixes, (0,) * weighs, (0,) * saves), h.new_empty(0)
    target_weights = none if target_weights is None else target_weights
    shares = none if shares is None else shares
    token_ids = targets.new_empty(0) if token_ids is None else token_ids
    dh, dshares = (x.new_empty(x.shape) if saves else none for x in (h, shares))
    grads = h.new_empty(num_spans, row.numel() if saves else 0)
    sums = h.new_empty(num_spans, 2, dtype=torch.float64)
    counts = (num_spans, num_rows, *sizes, num_pointed, ignored)
    inputs = (h, panels, targets, target_weights, token_ids, shares)
    run_rows(_score_spans, form, num_spans, work, *counts, *inputs, dh, dshares, grads, sums)
    nats, num_invalid = sums.sum(dim=0)
    if num_invalid:
        is_invalid = ((targets < 0) | (targets >= vocab)) & (targets != ignored)
        raise InputError(
            f"label {int(targets[is_invalid][0])} is no token of the vocabulary; pass 0 to "
            f"{vocab - 1}, or {ignored} where no loss is wanted"
        )
    return nats.to(h.dtype), dh, sum_spans(grads) if saves else none, dshares


def _scale_gradients(
    dh: Tensor, drow: Tensor, dshares: Tensor, dnats: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients, known since the forward pass but for this factor."""
    return dnats * dh, dnats * drow, dnats * dshares


_sum_cross_entropy = declare_operator(
    "sum_cross_entropy",
    run_forward,
    backward=_scale_gradients,
    results="nats",
    saved="dh drow dshares",
    gradients="h row shares",
    shapes=lambda h, row, panels, sizes, targets, token_ids, shares, target_weights, ignored: (
        h.new_empty(()),
        h.new_empty(h.shape),
        row.new_empty(row.shape),
        h.new_empty(0 if shares is None else shares.shape),
    ),
)


def sum_cross_entropy_native(
    h: Tensor,
    weights: PassWeights,
    targets: Tensor,
    token_ids: Tensor | None = None,
    shares: Tensor | None = None,
    target_weights: Tensor | None = None,
    *,
    ignored: int,
) -> Tensor:
    """Apply the output head and return the sum of the cross entropies in nats.

    Equation: E9, E17.

    Args:
        h: [..., D].
        weights: from ``prepare_head``.
        targets: [...] int64, ``ignored`` where nothing is counted.
        token_ids: [..., K] int64, what a pointer proposes; ``None`` without one.
        shares: [..., K], votes to add to those tokens' logits; or [..., 1 + K], ln of the
            vocabulary's and the tokens' shares of the probability.
        target_weights: [...] in the dtype of h, by which each cross entropy counts; ``None`` is 1.
        ignored: a number that is no token.

    Returns:
        [] in the dtype of h.

    Raises:
        InputError: for a target that is no token and not ``ignored``.
    """
    nats: Tensor = _sum_cross_entropy(
        h, *weights[:3], targets, token_ids, shares, target_weights, ignored
    )
    return nats
