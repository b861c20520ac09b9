"""The sum of gated contexts in Numba: one pass forward, one backward."""
# mypy: allow-untyped-defs

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

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


class _SumGated(torch.autograd.Function):
    """The sum with its backward kernel; not differentiable twice."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, *contexts: Tensor) -> Tensor:
        gates, *parts = (tensor.contiguous() for tensor in (logits, *contexts))
        width, num_gates = parts[0].shape[-1], len(parts)
        y = torch.empty_like(parts[0])
        sizes = (y.numel() // width, 16 * num_gates * width)
        padded = (*parts, *[parts[0]] * (3 - num_gates))
        run_rows(_sum_rows, _FORM, *sizes, width, num_gates, gates, *padded, y)
        ctx.save_for_backward(gates, *parts)
        ctx.sizes = sizes
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        gates, *parts = ctx.saved_tensors
        width, num_gates = parts[0].shape[-1], len(parts)
        dgates = torch.empty_like(gates)
        grads = [torch.empty_like(part) for part in parts]
        unused = 3 - num_gates
        given = (*parts, *[parts[0]] * unused, dy, dgates, *grads, *[grads[0]] * unused)
        run_rows(_backward_rows, _FORM, *ctx.sizes, width, num_gates, gates, *given)
        return dgates, *grads


def sum_gated_native(gates: Tensor, contexts: Sequence[Tensor]) -> Tensor:
    """Compute E11 on the CPU; arguments as in ``sum_gated``, at most three contexts."""
    y: Tensor = _SumGated.apply(gates, *contexts)
    return y
