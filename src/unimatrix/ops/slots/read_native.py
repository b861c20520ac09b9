"""The read of the chosen entries in Numba, positions over threads.

The kernels compute ``cosine_read.read_chosen`` and its gradient in one pass each, instead of a
dozen passes over [B, T, K, C] gathers.
"""
# mypy: allow-untyped-defs

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unimatrix.ops.cosine_read import LOGIT_SCALE, MIN_NORM, read_chosen
from unimatrix.ops.numba.compile import kernel, part
from unimatrix.ops.numba.lanes import pointer
from unimatrix.ops.numba.products import LANES
from unimatrix.ops.numba.threads import Shaped, map_rows
from unimatrix.ops.numba.tiles import add_multiple, multiply_rows
from unimatrix.ops.operator import declare_operator

Array = np.ndarray[Any, Any]


@part(fastmath={"reassoc", "contract", "nsz"})
def _compute_norm(vectors: Array, i: int) -> float:
    """Return max(norm, 1e-12) of one [C] row."""
    total = 0.0
    for c in range(vectors.shape[1]):
        total += vectors[i, c] * vectors[i, c]
    return max(math.sqrt(total), MIN_NORM)


@kernel()
def _norm_rows(first_row: int, last_row: int, vectors: Array, norms: Array) -> None:
    """Write max(norm, 1e-12) of rows of [R, C] to ``norms``."""
    for i in range(first_row, last_row):
        norms[i] = _compute_norm(vectors, i)


@part(fastmath={"reassoc", "contract", "nsz"})
def _normalize_backward(vectors: Array, grads: Array, i: int, norm: float) -> None:
    """Turn the gradient of a row's unit vector into that of the row, in place."""
    component = 0.0
    if norm > MIN_NORM:
        for c in range(vectors.shape[1]):
            component += grads[i, c] * vectors[i, c]
        component /= norm * norm
    scale = 1.0 / norm
    for c in range(vectors.shape[1]):
        grads[i, c] = scale * (grads[i, c] - component * vectors[i, c])


@kernel(fastmath={"reassoc", "contract", "nsz"})
def _read_rows(
    first_row: int,
    last_row: int,
    queries: Array,  # [B, T, C]
    keys: Array,  # [B, P, C]
    values: Array,  # [B, P, Dv]
    log_strength: Array,  # [B, P]
    chosen: Array,  # [B, T, K] int64, -1 from where fewer exist
    key_norms: Array,  # [B, P]
    context: Array,  # [B, T, Dv], written here
    weights: Array,  # [B, T, K], written here
) -> None:
    """Read at positions b T + t."""
    scale = 1.0 / math.sqrt(queries.shape[2])
    for row in range(first_row, last_row):
        b, t = row // queries.shape[1], row % queries.shape[1]
        count = 0
        best = -np.inf
        size, width = queries.shape[2], values.shape[2]
        query = pointer(queries, row * size)
        query_norm = _compute_norm(queries[b], t)
        context[b, t] = 0.0
        weights[b, t] = 0.0
        for k in range(chosen.shape[2]):
            entry = chosen[b, t, k]
            if entry < 0:
                break
            place = (b * keys.shape[1] + entry) * size
            cosine = multiply_rows(LANES, query, pointer(keys, place), size)
            cosine /= query_norm * key_norms[b, entry]
            logit = LOGIT_SCALE * (cosine * scale + log_strength[b, entry])
            weights[b, t, k] = logit
            best = max(best, logit)
            count += 1
        total = 0.0
        for k in range(count):
            weight = math.exp(weights[b, t, k] - best)
            weights[b, t, k] = weight
            total += weight
        for k in range(count):
            weight = weights[b, t, k] / total
            weights[b, t, k] = weight
            entry = chosen[b, t, k]
            value = pointer(values, (b * values.shape[1] + entry) * width)
            add_multiple(LANES, value, weight, width, pointer(context, row * width))


@kernel(fastmath={"reassoc", "contract", "nsz"})
def _query_gradient_rows(
    first_row: int,
    last_row: int,
    queries: Array,  # [B, T, C]
    keys: Array,  # [B, P, C]
    values: Array,  # [B, P, Dv]
    chosen: Array,  # [B, T, K] int64
    key_norms: Array,  # [B, P]
    weights: Array,  # [B, T, K]
    d_context: Array,  # [B, T, Dv]
    d_weights: Array,  # [B, T, K]
    d_scores: Array,  # [B, T, K], written here: by the score of each read
    shares: Array,  # [B, T, K], written here: by a key, in multiples of the query
    d_queries: Array,  # [B, T, C], written here
) -> None:
    """Find the gradients at positions b T + t, which no other position has part in."""
    scale = 1.0 / math.sqrt(queries.shape[2])
    for row in range(first_row, last_row):
        b, t = row // queries.shape[1], row % queries.shape[1]
        count = 0
        mean = 0.0
        size, width = queries.shape[2], values.shape[2]
        query_norm = _compute_norm(queries[b], t)
        d_queries[b, t] = 0.0
        for k in range(chosen.shape[2]):
            entry = chosen[b, t, k]
            if entry < 0:
                break
            value = pointer(values, (b * values.shape[1] + entry) * width)
            slope = multiply_rows(LANES, pointer(d_context, row * width), value, width)
            d_scores[b, t, k] = slope + d_weights[b, t, k]
            mean += weights[b, t, k] * d_scores[b, t, k]
            count += 1
        for k in range(count):
            entry = chosen[b, t, k]
            d_score = LOGIT_SCALE * weights[b, t, k] * (d_scores[b, t, k] - mean)
            d_scores[b, t, k] = d_score
            # Gradients of the unit vectors first: they are summed before they are projected.
            shares[b, t, k] = d_score * scale / query_norm
            from_key = d_score * scale / key_norms[b, entry]
            key = pointer(keys, (b * keys.shape[1] + entry) * size)
            add_multiple(LANES, key, from_key, size, pointer(d_queries, row * size))
        _normalize_backward(queries[b], d_queries[b], t, query_norm)


@kernel(fastmath={"reassoc", "contract", "nsz"})
def _entry_gradient_rows(
    first_row: int,
    last_row: int,
    num_parts: int,
    queries: Array,  # [B, T, C]
    chosen: Array,  # [B, T, K] int64
    weights: Array,  # [B, T, K]
    d_context: Array,  # [B, T, Dv]
    d_scores: Array,  # [B, T, K]
    shares: Array,  # [B, T, K]
    d_keys: Array,  # [B, P, C], written here, as the two after it
    d_values: Array,  # [B, P, Dv]
    d_log_strength: Array,  # [B, P]
) -> None:
    """Sum the gradients of a sequence's entries, each part some columns of keys and values."""
    for row in range(first_row, last_row):
        b, part = row // num_parts, row % num_parts
        size, width = d_keys.shape[2], d_values.shape[2]
        first_key, last_key = part * size // num_parts, (part + 1) * size // num_parts
        first_value, last_value = part * width // num_parts, (part + 1) * width // num_parts
        d_keys[b, :, first_key:last_key] = 0.0
        d_values[b, :, first_value:last_value] = 0.0
        if part == 0:
            d_log_strength[b] = 0.0
        for t in range(queries.shape[1]):
            position = b * queries.shape[1] + t
            for k in range(chosen.shape[2]):
                entry = chosen[b, t, k]
                if entry < 0:
                    break
                place = b * d_keys.shape[1] + entry
                d_read = pointer(d_context, position * width + first_value)
                target = pointer(d_values, place * width + first_value)
                add_multiple(LANES, d_read, weights[b, t, k], last_value - first_value, target)
                query = pointer(queries, position * size + first_key)
                target = pointer(d_keys, place * size + first_key)
                add_multiple(LANES, query, shares[b, t, k], last_key - first_key, target)
                if part == 0:
                    d_log_strength[b, entry] += d_scores[b, t, k]


@kernel()
def _normalize_backward_rows(
    first_row: int, last_row: int, vectors: Array, norms: Array, grads: Array
) -> None:
    """Turn gradients of the unit vectors of rows of [R, C] into those of the rows."""
    for i in range(first_row, last_row):
        _normalize_backward(vectors, grads, i, norms[i])


def _run_forward(
    queries: Tensor, keys: Tensor, values: Tensor, log_strength: Tensor, chosen: Tensor
) -> tuple[Tensor, ...]:
    keys = keys.contiguous()
    context = values.new_empty((*queries.shape[:2], values.shape[2]))
    weights, key_norms = queries.new_empty(chosen.shape), keys.new_empty(keys.shape[:2])
    rows = Shaped(keys.flatten(0, 1)), Shaped(key_norms.view(-1))
    map_rows(_norm_rows, key_norms.numel(), *rows, work=keys.numel())
    inputs = (x.contiguous() for x in (queries, keys, values, log_strength, chosen))
    arrays = map(Shaped, (*inputs, key_norms, context, weights))
    work = chosen.numel() * (queries.shape[2] + values.shape[2])
    map_rows(_read_rows, chosen.shape[0] * chosen.shape[1], *arrays, work=work)
    return context, weights, key_norms


def _run_backward(
    queries: Tensor, keys: Tensor, values: Tensor, chosen: Tensor, key_norms: Tensor,
    weights: Tensor, d_context: Tensor, d_weights: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    inputs = (queries, keys, values, chosen, key_norms, weights, d_context, d_weights)
    queries, keys, values, chosen, *others = (x.contiguous() for x in inputs)
    d_context = others[2]
    d_queries, d_keys, d_values, d_log_strength = (
        torch.empty_like(x) for x in (queries, keys, values, key_norms)
    )
    d_scores, shares = torch.zeros_like(weights), torch.zeros_like(weights)
    batch, num_tokens = chosen.shape[:2]
    work = chosen.numel() * (queries.shape[2] + values.shape[2])
    arrays = map(Shaped, (queries, keys, values, chosen, *others, d_scores, shares, d_queries))
    map_rows(_query_gradient_rows, batch * num_tokens, *arrays, work=work)
    # Where there are fewer sequences than threads, each takes some columns.
    num_parts = -(-torch.get_num_threads() // batch)
    of_reads = (queries, chosen, weights, d_context, d_scores, shares)
    arrays = map(Shaped, (*of_reads, d_keys, d_values, d_log_strength))
    map_rows(_entry_gradient_rows, batch * num_parts, num_parts, *arrays, work=work)
    arrays = map(Shaped, (keys.flatten(0, 1), key_norms.view(-1), d_keys.flatten(0, 1)))
    map_rows(_normalize_backward_rows, key_norms.numel(), *arrays, work=keys.numel())
    return d_queries, d_keys, d_values, d_log_strength


_read = declare_operator(
    "read_slots",
    _run_forward,
    backward=_run_backward,
    results="context weights",
    saved="key_norms",
    gradients="queries keys values log_strength",
)


def read_native(
    queries: Tensor, keys: Tensor, values: Tensor, log_strength: Tensor, chosen: Tensor
) -> tuple[Tensor, Tensor]:
    """Read as ``cosine_read.read_chosen``, arguments and results; -1 only after all entries.

    Equation: E6 (scores and softmax).

    Cost:
        O(B T K (C + Dv)) time, no gathers kept; once differentiable. Off the CPU it is
        ``cosine_read.read_chosen``.
    """
    if queries.device.type != "cpu":
        return read_chosen(queries, keys, values, log_strength, chosen)
    context, weights = _read(queries, keys, values, log_strength, chosen)
    return context, weights
