"""A depth step on the CPU as one operator: its four compiled passes, one after the other.

Each pass is an operator of its own too (``fused_passes``, ``matrix_state.projected``), for models
of which only some parts run compiled. Where all four do, autograd keeps one node instead of a dozen
with their views, and what one pass hands to the next lies as suits them both.
"""
# mypy: allow-untyped-calls

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from unimatrix.kernels.passes import feed_forward_native as feeding
from unimatrix.kernels.passes import mixing_native as mixing
from unimatrix.kernels.passes import projection_native as projecting
from unimatrix.kernels.passes.weights import NUM_LANES, PassWeights
from unimatrix.ops.matrix_state import fused_scan_native as scanning
from unimatrix.ops.numba.tiles import needs_gradient


class DepthStep(NamedTuple):
    """What a depth step is made of.

    Attributes:
        projections: norm, convolution and projections, from ``prepare_projections``.
        mixing: the readout's projection and the gates, from ``prepare_mixing``.
        feed_forward: norm and feed-forward network, from ``prepare_feed_forward``.
        num_heads: H.
        head_dim: N.
        squashes: whether the projected vectors pass through tanh.
        unit: whether they become unit vectors a head, and so does the readout.
    """

    projections: PassWeights
    mixing: PassWeights
    feed_forward: PassWeights
    num_heads: int
    head_dim: int
    squashes: bool
    unit: bool

    @property
    def passes(self) -> tuple[PassWeights, PassWeights, PassWeights]:
        """The weights."""
        return self.projections, self.mixing, self.feed_forward


class _ApplyDepthStep(torch.autograd.Function):
    """The passes with their backward kernels; not differentiable twice."""

    @staticmethod
    def forward(
        ctx: Any,
        step: DepthStep,
        saves: bool,
        lengths: Tensor | None,
        x: Tensor,
        recent: Tensor | None,
        initial: Tensor,
        *rows_and_contexts: Tensor,
    ) -> tuple[Tensor, ...]:
        x, initial = x.contiguous(), initial.contiguous()
        contexts = [context.contiguous() for context in rows_and_contexts[3:]]
        h, vectors, controls = projecting.run_forward(
            x, recent, step.projections, squashes=step.squashes, spare=NUM_LANES
        )
        y, final_state, *of_scan = scanning.run_forward(
            vectors, controls, initial, lengths, unit=step.unit, saves=saves
        )
        mixed, *of_mixing = mixing.run_forward(x, h, y, contexts, step.mixing, saves=saves)
        out, kept = feeding.run_forward(mixed, step.feed_forward, saves=saves)
        if saves:
            weights = [part for one in step.passes for part in one[:2]]
            kept_by_all = (h, vectors, y, *of_scan, mixed, *of_mixing, kept)
            ctx.save_for_backward(x, recent, lengths, *weights, *kept_by_all, *contexts)
        ctx.rest = [one[2:] for one in step.passes]
        ctx.squashes, ctx.shape = step.squashes, initial.shape
        ctx.rules = {"num_controls": controls.shape[-1], "unit": step.unit}
        ctx.set_materialize_grads(False)
        return out, h, final_state, *contexts

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        dout: Tensor | None,
        dh_elsewhere: Tensor | None,
        dfinal: Tensor | None,
        *elsewhere: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        x, recent, lengths, *saved = ctx.saved_tensors
        parts = zip(saved[0:6:2], saved[1:6:2], ctx.rest, strict=True)
        projections, gates, network = (PassWeights(*one, *rest) for *one, rest in parts)
        h, vectors, y, checkpoints, rules, inverses, mixed, *of_mixing, kept = saved[6:16]
        contexts = saved[16:]

        dout = torch.zeros_like(x) if dout is None else dout
        dmixed, dnetwork = feeding.run_backward(mixed, kept, network, dout)
        beside = _fill_gradients(elsewhere, contexts)
        dh, dy, dcontexts, dgates = mixing.run_backward(
            h, y, contexts, of_mixing, gates, dmixed, beside
        )
        if dh_elsewhere is not None:
            dh += dh_elsewhere
        dfinal = y.new_zeros(ctx.shape) if dfinal is None else dfinal
        of_scan = (checkpoints, rules, y, inverses)
        dvectors, dcontrols, dinitial = scanning.run_backward(
            vectors, lengths, of_scan, dy, dfinal, **ctx.rules
        )
        grads = (dmixed, dh, dvectors, dcontrols)
        dx, drecent, dprojections = projecting.run_backward(
            x, recent, projections, vectors, grads, squashes=ctx.squashes
        )
        before = None if recent is None else drecent.to(recent.dtype)
        drows = (dprojections, dgates, dnetwork)
        return None, None, None, dx, before, dinitial, *drows, *dcontexts


def _fill_gradients(grads: tuple[Tensor | None, ...], like: list[Tensor]) -> list[Tensor]:
    """Return gradients with zeros where others have one, or nothing where none has."""
    if all(grad is None for grad in grads):
        return []
    pairs = zip(grads, like, strict=True)
    return [torch.zeros_like(x) if grad is None else grad for grad, x in pairs]


def apply_depth_step_native(
    step: DepthStep,
    x: Tensor,
    recent: Tensor | None,
    initial_state: Tensor | None,
    contexts: list[Tensor],
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Project, scan the matrix state, mix and feed forward.

    Equation: E1 to E4, E11, E19, E22 to E24.

    Args:
        step: its weights.
        x: [B, T, D], the stream, float32 or float64 on the CPU.
        recent: [B, K - 1, D], normalised streams of the tokens before; ``None`` is zeros.
        initial_state: [B, H, N, N]; ``None`` is zeros.
        contexts: up to two, [B, T, D] each, gated beside the readout.
        lengths: [B] int64, real tokens of each row; ``None`` is T for all.

    Returns:
        the stream afterwards and its norm before, [B, T, D] each; the state after the last real
        token; the contexts, to go on with (their gradients are then summed in the pass).

    Cost: that of the four passes.
    """
    if initial_state is None:
        initial = x.new_zeros(x.shape[0], step.num_heads, step.head_dim, step.head_dim)
    else:
        initial = initial_state.to(x.dtype)
    rows = [one.row for one in step.passes]
    saves = needs_gradient(x, recent, initial, *rows, *contexts)
    results: tuple[Tensor, ...] = _ApplyDepthStep.apply(
        step, saves, lengths, x, recent, initial, *rows, *contexts
    )
    x, h, state, *contexts = results
    return x, h, state, contexts
