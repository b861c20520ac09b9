"""The sum of gated contexts in Numba: one pass forward, one backward."""
# mypy: allow-untyped-defs

from collections.abc import Sequence

from torch import Tensor

from unimatrix.ops.numba.compile import kernel, part
from unimatrix.ops.numba.lanes import (
    OPTIONS,
    exponential,
    load,
    minus,
    over,
    plus,
    pointer,
    store,
    times,
    zeros,
)
from unimatrix.ops.numba.threads import run_rows
from unimatrix.ops.operator import declare_operator

_FORM = ((0,) * 16, (0,))
"""Lanes, and the single lane of rows that have fewer numbers."""


@part(**OPTIONS)
def sigmoid(logits, ones):
    """Return the sigmoid of each lane."""
    return over(ones, plus(exponential(times(logits, -1.0)), 1.0))


@part(**OPTIONS)
def _sum_lanes(lanes, j, width, num_gates, gate, contexts, y):
    sums = zeros(y, lanes)
    ones = plus(sums, 1.0)
    for n in range(num_gates):
        share = sigmoid(load(gate, n * width + j, lanes), ones)
        sums = plus(sums, times(share, load(contexts[n], j, lanes)))
    store(y, j, sums)


@part(**OPTIONS)
def _backward_lanes(lanes, j, width, num_gates, gate, contexts, dy, dgate, dcontexts):
    dy_j, ones = load(dy, j, lanes), plus(zeros(dy, lanes), 1.0)
    for n in range(num_gates):
        share = sigmoid(load(gate, n * width + j, lanes), ones)
        dcontext = times(dy_j, share)
        dlogit = times(load(contexts[n], j, lanes), minus(dcontext, times(dcontext, share)))
        store(dgate, n * width + j, dlogit)
        store(dcontexts[n], j, dcontext)


@kernel(**OPTIONS)
def _sum_rows(
    first, last, form, width, num_gates, gates, context_1, context_2, context_3, y
):  # fmt: skip
    lanes, one_lane = form
    even = width - width % len(lanes)
    for row in range(first, last):
        at = row * width
        gate, target = pointer(gates, at * num_gates), pointer(y, at)
        contexts = (pointer(context_1, at), pointer(context_2, at), pointer(context_3, at))
        for j in range(0, even, len(lanes)):
            _sum_lanes(lanes, j, width, num_gates, gate, contexts, target)
        if 0 < even < width:  # the last lanes overlap with those before
            _sum_lanes(lanes, width - len(lanes), width, num_gates, gate, contexts, target)
        elif even == 0:
            for j in range(width):
                _sum_lanes(one_lane, j, width, num_gates, gate, contexts, target)


@kernel(**OPTIONS)
def _backward_rows(
    first, last, form, width, num_gates, gates, context_1, context_2, context_3, dy,
    dgates, dcontext_1, dcontext_2, dcontext_3,
):  # fmt: skip
    lanes, one_lane = form
    even = width - width % len(lanes)
    for row in range(first, last):
        at = row * width
        gate, dgate = pointer(gates, at * num_gates), pointer(dgates, at * num_gates)
        grad = pointer(dy, at)
        contexts = (pointer(context_1, at), pointer(context_2, at), pointer(context_3, at))
        grads = (pointer(dcontext_1, at), pointer(dcontext_2, at), pointer(dcontext_3, at))
        for j in range(0, even, len(lanes)):
            _backward_lanes(lanes, j, width, num_gates, gate, contexts, grad, dgate, grads)
        if 0 < even < width:  # the last lanes overlap with those before
            j = width - len(lanes)
            _backward_lanes(lanes, j, width, num_gates, gate, contexts, grad, dgate, grads)
        elif even == 0:
            for j in range(width):
                _backward_lanes(one_lane, j, width, num_gates, gate, contexts, grad, dgate, grads)


def _run_forward(
    gates: Tensor, context_1: Tensor, context_2: Tensor | None, context_3: Tensor | None
) -> Tensor:
    width = context_1.shape[-1]
    num_gates, y = gates.shape[-1] // width, context_1.new_empty(context_1.shape)
    contexts = [context_1 if x is None else x for x in (context_1, context_2, context_3)]
    work = 16 * num_gates * width
    run_rows(_sum_rows, _FORM, y.numel() // width, work, width, num_gates, gates, *contexts, y)
    return y


def _run_backward(
    gates: Tensor,
    context_1: Tensor,
    context_2: Tensor | None,
    context_3: Tensor | None,
    dy: Tensor,
) -> tuple[Tensor, ...]:
    width = context_1.shape[-1]
    num_gates, num_rows = gates.shape[-1] // width, context_1.numel() // width
    contexts = [context_1 if x is None else x for x in (context_1, context_2, context_3)]
    grads = [gates.new_empty(gates.shape), *(dy.new_empty(dy.shape) for _ in range(num_gates))]
    grads += grads[1:2] * (3 - num_gates)
    inputs, work = (gates, *contexts, dy, *grads), 16 * num_gates * width
    run_rows(_backward_rows, _FORM, num_rows, work, width, num_gates, *inputs)
    return tuple(grads)


_sum_gated = declare_operator(
    "sum_gated",
    _run_forward,
    backward=_run_backward,
    gradients="gates context_1 context_2 context_3",
)


def sum_gated_native(gates: Tensor, contexts: Sequence[Tensor]) -> Tensor:
    """Return the sum over i of sigmoid(gate_i) * context_i (E11), on the CPU.

    Args:
        gates: [..., G D], logits of the gates side by side.
        contexts: one to three tensors [..., D].

    Returns:
        [..., D].
    """
    y: Tensor = _sum_gated(gates, *[*contexts, None, None][:3])
    return y
