"""Hindsight write supervision: label every write by what reading it later was worth.

The operator is the identity on the logarithms of the read weights; its backward pass uses their
gradient. That gradient is minus the *attribution* of the read: to first order, the nats that the
loss would gain without the read. For a pointer in a mixture it is minus the responsibility of the
entry for the target, exactly. The sum over the reads of a write tells whether the write deserved
its slot, and the gate is trained to predict this.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unimatrix.ops.operator import refuse_twice

LABELS = ("attribution", "read_hit", "read_weight")
LEAST_WEIGHT = 0.05


class HindsightRules(NamedTuple):
    """How a write is judged.

    Attributes:
        label: ``attribution`` (nats, context and pointer), ``read_hit`` (a read with weight above
            0.05 returned the target) or ``read_weight`` (a read had such a weight).
        share: an attribution is useful above this share of the sequence's largest,
        floor: and above so many nats.
        weight: of the gate's loss beside the model's.
    """

    label: str
    share: float
    floor: float
    weight: float


class HindsightScale(NamedTuple):
    """Two zeros to add to the loss, whose gradients tell the backward pass the loss's scale.

    Attributes:
        of_target: added times 1 / the divisor of the loss; its gradient is d total / d nat.
        of_gate: added times the share of the targets in this batch; its gradient is the weight of
            the gate's loss, which is a mean over writes.
        num_writes: those that it is a mean over.
    """

    of_target: Tensor
    of_gate: Tensor
    num_writes: Tensor

    @staticmethod
    def join(scales: Sequence["HindsightScale"]) -> tuple[Tensor, Tensor]:
        """Return the zeros of all parts of a batch, as one part of all its writes has them."""
        total = sum(scale.num_writes for scale in scales).clamp_min(1)  # type: ignore[union-attr]
        # Not by the quotient of two whole numbers, which torch makes in 32 bits.
        of_gate = [scale.of_gate * scale.num_writes / total for scale in scales]
        return sum(scale.of_target for scale in scales), sum(of_gate)  # type: ignore[return-value]


def judge_writes(attribution: Tensor, rules: HindsightRules) -> Tensor:
    """Return which writes were useful.

    Equation: E16.

    Args:
        attribution: [B, W], what the reads of each write were worth.
        rules: see ``HindsightRules``.

    Returns:
        [B, W] bool: above the floor, and above the share of the row's largest.
    """
    if rules.label != "attribution":
        return attribution > 0
    largest = attribution.amax(dim=1, keepdim=True)
    return attribution > (rules.share * largest).clamp_min(rules.floor)


def watch_reads(
    log_weights: Tensor,
    gate_logits: Tensor,
    entries: Tensor,
    offered: Tensor,
    num_initial: int,
    rules: HindsightRules,
) -> tuple[Tensor, Tensor, HindsightScale]:
    """Let the gate learn from how the reads turn out.

    Equation: E15, E16.
    Source: this project; the signal is that of architecture note "hindsight write supervision".

    Args:
        log_weights: [B, T, Q], ln of the weight of each read, -inf where nothing was found.
        gate_logits: [B, T, N], logit of each write's strength.
        entries: [B, T, Q] int64, the write M + t N + n that each read found; below M for none.
        offered: [B, T, N] bool, whether the position offered that write.
        num_initial: M.
        rules: how a write is judged.

    Returns:
        ``log_weights`` unchanged; a probe, zeros [B, T, Q] to add to the log weights of the same
        entries in a pointer, so that their gradients there count too; and the scale to add to the
        loss.

    Cost:
        One scatter of B T Q numbers in the backward pass.
    """
    watched: tuple[Tensor, Tensor, Tensor, Tensor] = _Watch.apply(  # type: ignore[no-untyped-call]
        log_weights, gate_logits, entries, offered, num_initial, rules
    )
    passed, probe, of_target, of_gate = watched
    return passed, probe, HindsightScale(of_target, of_gate, offered.sum())


class _Watch(torch.autograd.Function):
    """Identity on the weights; the backward pass adds the gate's cross entropy."""

    @staticmethod
    def forward(ctx: Any, log_weights: Tensor, gate_logits: Tensor, *others: Any) -> Any:
        entries, offered, num_initial, rules = others
        ctx.save_for_backward(log_weights, gate_logits, entries, offered)
        ctx.num_initial, ctx.rules = num_initial, rules
        zero = gate_logits.new_zeros(())
        return log_weights.view_as(log_weights), torch.zeros_like(log_weights), zero, zero.clone()

    @staticmethod
    def backward(
        ctx: Any, d_weights: Tensor, d_probe: Tensor, d_target: Tensor, d_gate: Tensor
    ) -> tuple[Tensor | None, ...]:
        log_weights, gate_logits, entries, offered = ctx.saved_tensors
        with torch.no_grad():
            scale = d_target.abs().clamp_min(torch.finfo(d_target.dtype).tiny)
            reads = _value_reads(ctx.rules.label, log_weights, d_weights, d_probe, scale)
            writes = (entries - ctx.num_initial).clamp_min(-1) + 1  # 0 collects what is no write
            sums = reads.new_zeros(reads.shape[0], gate_logits[0].numel() + 1)
            sums.scatter_add_(1, writes.flatten(1), reads.flatten(1))
            useful = judge_writes(sums[:, 1:], ctx.rules).view_as(gate_logits)
            slope = (torch.sigmoid(gate_logits) - useful.to(gate_logits.dtype)) * offered
            d_logits = ctx.rules.weight * d_gate * slope / offered.sum().clamp_min(1)
        found = (d_weights, d_logits, None, None, None, None)
        return refuse_twice("what a gate learns in hindsight", found, log_weights, gate_logits)


def _value_reads(
    label: str, log_weights: Tensor, d_weights: Tensor, d_probe: Tensor, scale: Tensor
) -> Tensor:
    """Return what each read [B, T, Q] was worth, as the label counts it."""
    if label == "attribution":
        return -(d_weights + d_probe) / scale
    read = log_weights.exp() > LEAST_WEIGHT
    if label == "read_hit":
        read &= d_probe < -LEAST_WEIGHT * scale
    return read.to(d_weights.dtype)
