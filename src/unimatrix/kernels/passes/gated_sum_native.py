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

_FORM = ((0,) * 16, (0,))  # numbers handled together; in rows that are shorter, one


@part(**OPTIONS)
def squash(logits, ones):
    """Return the sigmoid of each lane."""
    return over(ones, plus(exponential(times(logits, -1.0)), 1.0))


@part(**OPTIONS)
def _sum_part(lanes, j, width, num_gates, gate, parts, target):
    mixed = zeros(target, lanes)
    ones = plus(mixed, 1.0)
    for n in range(num_gates):
        share = squash(load(gate, n * width + j, lanes), ones)
        mixed = plus(mixed, times(share, load(parts[n], j, lanes)))
    store(target, j, mixed)


@part(**OPTIONS)
def _backward_part(lanes, j, width, num_gates, gate, parts, grad, dgate, dparts):
    along, ones = load(grad, j, lanes), plus(zeros(grad, lanes), 1.0)
    for n in range(num_gates):
        share = squash(load(gate, n * width + j, lanes), ones)
        let = times(along, share)
        slope = times(load(parts[n], j, lanes), minus(let, times(let, share)))
        store(dgate, n * width + j, slope)
        store(dparts[n], j, let)


@kernel(**OPTIONS)
def _sum_rows(first, last, form, width, num_gates, gates, one, two, three, y):
    lanes, one_lane = form
    even = width - width % len(lanes)
    for row in range(first, last):
        at = row * width
        gate, target = pointer(gates, at * num_gates), pointer(y, at)
        parts = (pointer(one, at), pointer(two, at), pointer(three, at))
        for j in range(0, even, len(lanes)):
            _sum_part(lanes, j, width, num_gates, gate, parts, target)
        if 0 < even < width:  # once more over the last lanes, some for the second time
            _sum_part(lanes, width - len(lanes), width, num_gates, gate, parts, target)
        elif even == 0:
            for j in range(width):
                _sum_part(one_lane, j, width, num_gates, gate, parts, target)


@kernel(**OPTIONS)
def _backward_rows(
    first, last, form, width, num_gates, gates, one, two, three, dy,
    dgates, done, dtwo, dthree,
):  # fmt: skip
    lanes, one_lane = form
    even = width - width % len(lanes)
    for row in range(first, last):
        at = row * width
        gate, dgate = pointer(gates, at * num_gates), pointer(dgates, at * num_gates)
        grad = pointer(dy, at)
        parts = (pointer(one, at), pointer(two, at), pointer(three, at))
        dparts = (pointer(done, at), pointer(dtwo, at), pointer(dthree, at))
        for j in range(0, even, len(lanes)):
            _backward_part(lanes, j, width, num_gates, gate, parts, grad, dgate, dparts)
        if 0 < even < width:
            at_end = width - len(lanes)
            _backward_part(lanes, at_end, width, num_gates, gate, parts, grad, dgate, dparts)
        elif even == 0:
            for j in range(width):
                _backward_part(one_lane, j, width, num_gates, gate, parts, grad, dgate, dparts)


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
    """Compute E11 on the CPU; arguments as in ``sum_gated``, at most three contexts."""
    y: Tensor = _sum_gated(gates, *[*contexts, None, None][:3])
    return y
