"""What a depth step does beside its scan, each in one compiled pass forward and one backward.

Composed of tensor operations, a norm, a gated sum, a gated unit or a short convolution reads and
writes its features ten to twenty times, and at the widths of small models that takes longer than
the products. The passes (float32 and float64 on the CPU, differentiable once) do each in one
compiled loop; those here take the products with them. ``kernels.plan`` says where they run.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from unimatrix.kernels.passes.weights import PassWeights


class FoundInSlots(NamedTuple):
    """What slots found for a pointer, and how it is scored.

    Attributes:
        weight, bias: [Q, D] and [Q], of the scores of h.
        token_ids: [..., Q] int64.
        log_strength: [..., Q], added to the scores; -inf where nothing was found.
        elsewhere: [..., Q] zeros (``ops.hindsight``), to which the gradients by ln of these shares
            go; ``None`` where nobody asks.
    """

    weight: Tensor
    bias: Tensor
    token_ids: Tensor
    log_strength: Tensor
    elsewhere: Tensor | None


class FoundMatch(NamedTuple):
    """What an automaton predicts for a pointer, and how it is scored.

    Attributes:
        weight, bias: [1, D] and [1], of the score of h.
        by_length: [L], added for matches of 1, 2, 3-4, 5-8, ... tokens, the last for all longer.
        predicted_ids: [...] int64, -1 where nothing matched.
        match_lengths: [...] int64.
    """

    weight: Tensor
    bias: Tensor
    by_length: Tensor
    predicted_ids: Tensor
    match_lengths: Tensor


def add_feed_forward(x: Tensor, weights: PassWeights) -> Tensor:
    """Return the stream and what a feed-forward network makes of its norm.

    Equation: E23.

    Args:
        x: [..., D].
        weights: from ``feed_forward_native.prepare_feed_forward``.

    Returns:
        [..., D].
    """
    from unimatrix.kernels.passes.feed_forward_native import add_feed_forward_native

    return add_feed_forward_native(x, weights)


def add_mixed(x: Tensor, h: Tensor, contexts: Sequence[Tensor], weights: PassWeights) -> Tensor:
    """Return the stream and the gated sum of the mixers' contexts.

    Equation: E4 (the readout's projection), E11.

    Args:
        x: [..., D].
        h: [..., D], what the gates see.
        contexts: one to three, the readout [..., R] before its projection, then [..., D].
        weights: from ``mixing_native.prepare_mixing``.

    Returns:
        [..., D].
    """
    from unimatrix.kernels.passes.mixing_native import add_mixed_native

    return add_mixed_native(x, h, contexts, weights)


def project(
    x: Tensor, recent: Tensor | None, weights: PassWeights, *, squashes: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise the stream, convolve, and apply a mixer's projections.

    Equation: E19, E22; E24 with tanh.

    Args:
        x: [B, T, D].
        recent: [B, K - 1, D], normalised streams of the tokens before; ``None`` is zeros.
        weights: from ``projection_native.prepare_projections``.
        squashes: whether the vectors pass through tanh.

    Returns:
        the normalised stream, the vectors and the controls, [B, T, D or V or C].
    """
    from unimatrix.kernels.passes.projection_native import project_native

    return project_native(x, recent, weights, squashes=squashes)


def sum_cross_entropy(
    h: Tensor,
    weights: PassWeights,
    targets: Tensor,
    token_ids: Tensor | None = None,
    shares: Tensor | None = None,
    *,
    ignored: int,
) -> Tensor:
    """Apply the output head and return the sum of the cross entropies in nats.

    Equation: E9, E17.

    Args:
        h: [..., D].
        weights: from ``head_native.prepare_head``.
        targets: [...] int64, ``ignored`` where nothing is counted.
        token_ids: [..., K] int64, what a pointer proposes; ``None`` without one.
        shares: [..., K], votes to add to those tokens' logits; or [..., 1 + K], ln of the
            vocabulary's and the tokens' shares of the probability.
        ignored: a number that is no token.

    Returns:
        [] in the dtype of h.

    Raises:
        InputError: for a target that is no token and not ``ignored``.
    """
    from unimatrix.kernels.passes.head_native import sum_cross_entropy_native

    return sum_cross_entropy_native(h, weights, targets, token_ids, shares, ignored=ignored)
