"""The gate that weighs a write by the two tokens before and at it, in Numba."""
# mypy: allow-untyped-defs

from typing import NamedTuple

import numpy as np
from torch import Tensor

from unimatrix.ops.numba.compile import kernel, part
from unimatrix.ops.numba.gaussian import find_normal_density, integrate_normal
from unimatrix.ops.numba.lanes import (
    OPTIONS,
    at,
    keep,
    load,
    plus,
    pointer,
    store,
    times,
    total,
    zeros,
)
from unimatrix.ops.numba.products import LANES
from unimatrix.ops.numba.threads import run_rows
from unimatrix.ops.numba.tiles import TILE, count_spans, sum_spans
from unimatrix.ops.operator import declare_operator


class _GateForm(NamedTuple):
    """Options of the kernels as tuples, since Numba compiles a kernel for their lengths."""

    lanes: tuple[int, ...]
    double: tuple[int, ...]  # empty: float32


@part(**OPTIONS)
def _add_inputs(lanes, of_last, of_this, last_id, this_id, inner, j):
    """Return what enters the activation from column j on."""
    inputs = load(of_this, this_id * inner + j, lanes)
    if last_id >= 0:
        inputs = plus(inputs, load(of_last, last_id * inner + j, lanes))
    return inputs


@kernel(**OPTIONS)
def _weigh_rows(
    first, last, form, num_tokens, num_before, inner, num_patterns,
    stream, of_last, of_this, down, down_bias, logits,
):  # fmt: skip
    lanes, G, N = form.lanes, inner, num_patterns
    activations = np.empty(G, logits.dtype)
    activated = pointer(activations, 0)
    for row in range(first, last):
        place = (row // num_tokens + 1) * num_before + row
        last_id, this_id = stream[place - 1], stream[place]
        for j in range(0, G, len(lanes)):
            u = _add_inputs(lanes, pointer(of_last, 0), pointer(of_this, 0), last_id, this_id, G, j)
            store(activated, j, times(u, integrate_normal(form.double, u)))
        for n in range(N):
            sums = zeros(activated, lanes)
            for j in range(0, G, len(lanes)):
                down_j = load(pointer(down, n * G), j, lanes)
                sums = plus(sums, times(load(activated, j, lanes), down_j))
            logits[row * N + n] = total(sums) + down_bias[n]
    keep(activations)


@kernel(**OPTIONS)
def _backward_spans(
    first, last, form, num_spans, num_rows, num_tokens, num_before, inner, num_patterns,
    stream, of_last, of_this, down, dlogits, grads,
):  # fmt: skip
    lanes, G, N = form.lanes, inner, num_patterns
    num_grads = len(grads) // num_spans
    for span in range(first, last):
        grads[span * num_grads : (span + 1) * num_grads] = 0
        dlast = pointer(grads, span * num_grads)
        dthis = at(dlast, len(of_last))
        ddown = at(dthis, len(of_this))
        dbias = at(ddown, N * G)
        for row in range(span * num_rows // num_spans, (span + 1) * num_rows // num_spans):
            place = (row // num_tokens + 1) * num_before + row
            last_id, this_id = stream[place - 1], stream[place]
            for n in range(N):
                dbias[n] += dlogits[row * N + n]
            for j in range(0, G, len(lanes)):
                u = _add_inputs(
                    lanes, pointer(of_last, 0), pointer(of_this, 0), last_id, this_id, G, j
                )
                share = integrate_normal(form.double, u)
                activation, dactivation = times(u, share), zeros(ddown, lanes)
                for n in range(N):
                    dlogit, target = dlogits[row * N + n], at(ddown, n * G)
                    down_j = load(pointer(down, n * G), j, lanes)
                    dactivation = plus(dactivation, times(down_j, dlogit))
                    store(target, j, plus(load(target, j, lanes), times(activation, dlogit)))
                du = times(dactivation, plus(share, times(u, find_normal_density(u))))
                target = at(dthis, this_id * G)
                store(target, j, plus(load(target, j, lanes), du))
                if last_id >= 0:
                    target = at(dlast, last_id * G)
                    store(target, j, plus(load(target, j, lanes), du))


def _run_forward(
    stream: Tensor,
    num_before: int,
    of_last: Tensor,
    of_this: Tensor,
    down: Tensor,
    down_bias: Tensor,
) -> Tensor:
    (num_patterns, inner), batch = down.shape, stream.shape[0]
    num_tokens = stream.shape[1] - num_before
    logits = down.new_empty(batch, num_tokens, num_patterns)
    form = _GateForm(LANES, (0,) * (down.itemsize == 8))
    sizes = (num_tokens, num_before, inner, num_patterns)
    inputs = (stream, of_last, of_this, down, down_bias, logits)
    run_rows(_weigh_rows, form, batch * num_tokens, 20 * inner, *sizes, *inputs)
    return logits


def _run_backward(
    stream: Tensor, of_last: Tensor, of_this: Tensor, down: Tensor, num_before: int,
    dlogits: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    (num_patterns, inner), num_tokens = down.shape, dlogits.shape[1]
    num_rows = dlogits.shape[0] * num_tokens
    num_spans = count_spans(-(-num_rows // TILE))
    counts = [of_last.numel(), of_this.numel(), down.numel(), num_patterns]
    grads = down.new_empty(num_spans, sum(counts))
    form = _GateForm(LANES, (0,) * (down.itemsize == 8))
    sizes = (num_spans, num_rows, num_tokens, num_before, inner, num_patterns)
    inputs = (stream, of_last, of_this, down, dlogits, grads)
    run_rows(_backward_spans, form, num_spans, 30 * num_rows * inner // num_spans, *sizes, *inputs)
    dlast, dthis, ddown, dbias = sum_spans(grads).split(counts)
    tables = dlast.view(of_last.shape), dthis.view(of_this.shape)
    return *tables, ddown.view(down.shape), dbias


_weigh_writes = declare_operator(
    "weigh_writes",
    _run_forward,
    backward=_run_backward,
    results="logits",
    gradients="of_last of_this down down_bias",
)


def weigh_writes_native(
    stream: Tensor,
    num_before: int,
    of_last: Tensor,
    of_this: Tensor,
    down: Tensor,
    down_bias: Tensor,
) -> Tensor:
    """Weigh writes by the token of each position and the one before.

    Equation: E14 (the gate).

    Args:
        stream: [B, n + T] int64, -1 where there is no token, n >= 1.
        num_before: n.
        of_last, of_this: [V, G] each, what the token before and that of the position add before the
            activation, G a multiple of 16.
        down, down_bias: [N, G] and [N].

    Returns:
        logits [B, T, N], differentiable once in the four weights.
    """
    logits: Tensor = _weigh_writes(stream, num_before, of_last, of_this, down, down_bias)
    return logits
