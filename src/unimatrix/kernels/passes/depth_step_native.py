"""A depth step on the CPU as one operator: its four compiled passes, one after the other.

Each pass is also an operator of its own, for models of which only some parts run compiled. Where
all four do, autograd keeps one node instead of a dozen with their views, and the vectors that one
pass writes have the row stride that the next one reads fastest.
"""
# mypy: allow-untyped-calls

from typing import NamedTuple

import torch
from torch import Tensor

from unimatrix.kernels.passes import feed_forward_native as feeding
from unimatrix.kernels.passes import mixing_native as mixing
from unimatrix.kernels.passes import projection_native as projecting
from unimatrix.kernels.passes.projection_native import ProjectionSizes
from unimatrix.kernels.passes.weights import NUM_LANES, PassWeights
from unimatrix.ops.matrix_state import fused_scan_native as scanning
from unimatrix.ops.operator import declare_operator


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
    def is_mixed(self) -> bool:
        """Whether rules are mixed: a head then has controls beside its retention."""
        return ProjectionSizes(*self.projections.sizes).num_controls > self.num_heads


def _run_forward(
    step: DepthStep, x: Tensor, recent: Tensor | None, initial: Tensor, lengths: Tensor | None,
    projections: Tensor, mixing_weights: Tensor, network: Tensor, context_1: Tensor | None,
    context_2: Tensor | None, *, saves: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Run the passes; the rows of weights are inputs of their own because they have gradients."""
    h, vectors, controls = projecting.run_forward(
        x, recent, *step.projections, step.squashes, spare=NUM_LANES
    )
    y, state, *of_scan = scanning.run_forward(
        vectors, controls, initial, lengths, step.is_mixed, step.unit, saves=saves
    )
    row, panels, sizes, _ = step.mixing
    mixed, *of_mixing = mixing.run_forward(
        x, h, y, context_1, context_2, row, panels, sizes, saves=saves
    )
    out, activations = feeding.run_forward(mixed, *step.feed_forward, saves=saves)
    results = (out, h, state, context_1, context_2)
    return *results, vectors, y, *of_scan, mixed, *of_mixing, activations


def _run_backward(
    x: Tensor, recent: Tensor | None, lengths: Tensor | None, context_1: Tensor | None,
    context_2: Tensor | None, h: Tensor, vectors: Tensor, y: Tensor, checkpoints: Tensor,
    token_weights: Tensor, inverses: Tensor, mixed: Tensor, gates: Tensor, projected: Tensor,
    activations: Tensor, step: DepthStep, dout: Tensor | None, dh_beside: Tensor | None,
    dstate: Tensor | None, dcontext_1: Tensor | None, dcontext_2: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Run the backward kernels from the last pass to the first."""
    dout = torch.zeros_like(x) if dout is None else dout
    dmixed, dnetwork = feeding.run_backward(mixed, activations, *step.feed_forward, dout)
    contexts = (context_1, context_2)
    beside = _fill_gradients((dcontext_1, dcontext_2), contexts)
    of_mixing = (h, y, *contexts, gates, projected, *step.mixing[:3], dmixed)
    dh, dy, *dcontexts, dmixing = mixing.run_backward(*of_mixing, dcontexts=beside)
    if dh_beside is not None:
        dh += dh_beside
    if dstate is None:
        dstate = y.new_zeros(y.shape[0], step.num_heads, step.head_dim, step.head_dim)
    of_scan = (vectors, lengths, checkpoints, token_weights, y, inverses, step.is_mixed, step.unit)
    dvectors, dcontrols, dinitial = scanning.run_backward(*of_scan, dy, dstate)
    row, panels, sizes, eps = step.projections
    dx, drecent, dprojections = projecting.run_backward(
        x, recent, row, panels, vectors, sizes, eps, step.squashes,
        dh, dvectors, dcontrols, dstream=dmixed,
    )  # fmt: skip
    return dx, drecent, dinitial, dprojections, dmixing, dnetwork, *dcontexts


def _fill_gradients(
    grads: tuple[Tensor | None, ...], contexts: tuple[Tensor | None, ...]
) -> list[Tensor]:
    """Return gradients with zeros in place of a missing one, or nothing if all are missing."""
    if all(grad is None for grad in grads):
        return []
    pairs = zip(grads, contexts, strict=True)
    return [torch.zeros_like(x) if grad is None else grad for grad, x in pairs if x is not None]


_apply_depth_step = declare_operator(
    "apply_depth_step",
    _run_forward,
    backward=_run_backward,
    results="out h state passed_1 passed_2",
    saved="vectors y checkpoints token_weights inverses mixed gates projected activations",
    gradients="x recent initial projections mixing_weights network context_1 context_2",
)


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
        token; the contexts again. If later uses take these, the pass sums their gradients.

    Cost: that of the four passes.
    """
    if initial_state is None:
        initial = x.new_zeros(x.shape[0], step.num_heads, step.head_dim, step.head_dim)
    else:
        initial = initial_state.to(x.dtype)
    rows = (step.projections.row, step.mixing.row, step.feed_forward.row)
    padded = [*contexts, None, None][:2]
    x, h, state, *passed = _apply_depth_step(step, x, recent, initial, lengths, *rows, *padded)
    return x, h, state, passed[: len(contexts)]
