"""What a depth step does beside its scan, each in one pass forward and one backward on the CPU.

Composed of tensor operations, a norm, a gated sum, a gated unit or a short convolution reads and
writes its features ten to twenty times, and at the widths of small models that takes longer than
the products. The native back end (float32 and float64 on the CPU, differentiable once) does each in
one compiled loop. ``project``, ``add_mixed``, ``add_feed_forward`` and ``sum_cross_entropy`` take
the products with them, where ``fuses_products``. Elsewhere, and for the few rows of a decoding
step, the reference runs.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from unimatrix.errors import InputError
from unimatrix.kernels.passes import reference
from unimatrix.kernels.passes.weights import NUM_LANES, PassWeights
from unimatrix.ops.backends import require_backend
from unimatrix.ops.checks import is_autocast

__all__ = [
    "FoundInSlots",
    "FoundMatch",
    "add_feed_forward",
    "add_mixed",
    "apply_gated_unit",
    "convolve_recent",
    "fuses_products",
    "normalize_rows",
    "project",
    "runs_native",
    "sum_cross_entropy",
    "sum_gated",
    "weigh_retrieved",
]

# Below, torch is as fast and needs no compiler.
_FEWEST_ROWS = 17
_MOST_CONTEXTS = 3
_MOST_WEIGHTS = 600_000  # of one pass; above, a library's products are as fast


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


def runs_native(backend: str, *tensors: Tensor | None) -> bool:
    """Return whether the compiled pass is asked for, or wanted and able to take the tensors.

    Args:
        backend: ``auto``, ``reference`` or ``native``.
        tensors: [..., D] the first; ``None`` is none.

    Raises:
        InputError: if the back end does not exist, or is ``native`` and cannot take them.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    kinds = {(tensor.device.type, tensor.dtype) for tensor in given}
    able = kinds in ({("cpu", torch.float32)}, {("cpu", torch.float64)})
    if backend == "auto":
        # A compiler of graphs joins the reference's operations itself.
        if torch.compiler.is_compiling():
            return False
        return able and given[0].shape[:-1].numel() >= _FEWEST_ROWS
    if require_backend("fused_passes", backend) == "native" and not able:
        names = ", ".join(sorted(f"{dtype} on {device}" for device, dtype in kinds))
        raise InputError(
            f"backend 'native' takes float32 or float64 on the CPU, not {names}; pass auto."
        )
    return backend == "native"


def fuses_products(
    x: Tensor, weights: Sequence[Tensor], backend: str = "auto", *, inner_width: int = 0
) -> bool:
    """Return whether layers and what stands between them may run as one compiled pass.

    Under ``torch.compile`` too: its compiler joins what stands between products, this the products.

    Args:
        x: [..., D], the stream.
        weights: of all layers.
        backend: ``auto``, ``reference`` or ``native``.
        inner_width: of a product inside that is not padded.
    """
    if backend == "reference" or is_autocast(x.device.type):
        return False
    if x.shape[-1] % NUM_LANES or inner_width % NUM_LANES:
        return False
    plain = all(type(weight) in (Tensor, nn.Parameter) for weight in weights)
    kinds = {(tensor.device.type, tensor.dtype) for tensor in (x, *weights)}
    if not plain or kinds not in ({("cpu", torch.float32)}, {("cpu", torch.float64)}):
        return False
    is_small = sum(weight.numel() for weight in weights) <= _MOST_WEIGHTS
    return backend == "native" or (is_small and x.shape[:-1].numel() >= _FEWEST_ROWS)


def add_feed_forward(x: Tensor, weights: PassWeights) -> Tensor:
    """Return the stream and what a feed-forward network makes of its norm.

    Equation: E23.

    Args:
        x: [..., D], for which ``fuses_products``.
        weights: from ``feed_forward_native.prepare_feed_forward``.

    Returns:
        [..., D].
    """
    if torch.compiler.is_compiling():
        from unimatrix.ops import opaque

        result: Tensor = opaque.add_feed_forward(x, *weights)[0]
        return result
    from unimatrix.kernels.passes.feed_forward_native import add_feed_forward_native

    return add_feed_forward_native(x, weights)


def add_mixed(x: Tensor, h: Tensor, contexts: Sequence[Tensor], weights: PassWeights) -> Tensor:
    """Return the stream and the gated sum of the mixers' contexts.

    Equation: E4 (the readout's projection), E11.

    Args:
        x: [..., D], for which ``fuses_products``.
        h: [..., D], what the gates see.
        contexts: one to three, the readout [..., R] before its projection, then [..., D].
        weights: from ``mixing_native.prepare_mixing``.

    Returns:
        [..., D].
    """
    if torch.compiler.is_compiling():
        from unimatrix.ops import opaque

        mixed: Tensor = opaque.add_mixed(x, h, list(contexts), *weights[:3])[0]
        return mixed
    from unimatrix.kernels.passes.mixing_native import add_mixed_native

    return add_mixed_native(x, h, contexts, weights)


def project(
    x: Tensor, recent: Tensor | None, weights: PassWeights, *, squashes: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise the stream, convolve, and apply a mixer's projections.

    Equation: E19, E22; E24 with tanh.

    Args:
        x: [B, T, D], for which ``fuses_products``.
        recent: [B, K - 1, D], normalised streams of the tokens before; ``None`` is zeros.
        weights: from ``projection_native.prepare_projections``.
        squashes: whether the vectors pass through tanh.

    Returns:
        the normalised stream, the vectors and the controls, [B, T, D or V or C].
    """
    if torch.compiler.is_compiling():
        from unimatrix.ops import opaque

        projected: tuple[Tensor, Tensor, Tensor] = opaque.project(x, recent, *weights, squashes)
        return projected
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
        h: [..., D], for which ``fuses_products``.
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
    if torch.compiler.is_compiling():
        from unimatrix.ops import opaque

        others = (targets, token_ids, shares, ignored)
        total: Tensor = opaque.sum_cross_entropy(h, *weights[:3], *others)[0]
        return total
    from unimatrix.kernels.passes.head_native import sum_cross_entropy_native

    return sum_cross_entropy_native(h, weights, targets, token_ids, shares, ignored=ignored)


def weigh_retrieved(
    h: Tensor, slots: FoundInSlots | None, match: FoundMatch | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Weigh retrieved tokens against the vocabulary's distribution, whose score is 0.

    Equation: E17.

    Args:
        h: [..., D], which with all floats of the others is for ``runs_native``.
        slots: what they found, or ``None``.
        match: what the automaton predicts, or ``None``; one of both is given.

    Returns:
        h, to go on with (its gradient is then summed in the pass); token ids [..., K] int64, those
        of the slots first; ln of the shares [..., 1 + K], the vocabulary's first, -inf for what was
        not found.
    """
    from unimatrix.kernels.passes.pointer_native import weigh_retrieved_native

    return weigh_retrieved_native(h, slots, match)


def normalize_rows(
    x: Tensor, weight: Tensor | None, eps: float, *, backend: str = "auto"
) -> Tensor:
    """Divide each feature vector by the root of its mean square, and scale.

    Equation: E22.

    Args:
        x: [..., D] any float.
        weight: [D]; ``None`` is ones.
        eps: added to the mean square.
        backend: ``auto``, ``reference`` or ``native``.

    Returns:
        [..., D] in the dtype of x.
    """
    if not runs_native(backend, x, weight):
        return reference.normalize_rows(x, weight, eps)
    from unimatrix.kernels.passes.row_norm_native import normalize_rows_native

    return normalize_rows_native(x, weight, eps)


def sum_gated(gates: Tensor, contexts: Sequence[Tensor], *, backend: str = "auto") -> Tensor:
    """Return the sum over i of sigmoid(gate_i) * context_i.

    Equation: E11.

    Args:
        gates: [..., G D] any float, logits of the gates side by side.
        contexts: one to three tensors [..., D].
        backend: ``auto``, ``reference`` or ``native``.

    Returns:
        [..., D].

    Raises:
        InputError: if there are more contexts, or the widths do not fit.
    """
    width = contexts[0].shape[-1]
    if len(contexts) > _MOST_CONTEXTS or gates.shape[-1] != len(contexts) * width:
        raise InputError(
            f"there are {len(contexts)} contexts of width {width} and {gates.shape[-1]} gate "
            f"logits; pass at most {_MOST_CONTEXTS} contexts and a logit for each of their numbers"
        )
    if not runs_native(backend, gates, *contexts):
        return reference.sum_gated(gates, contexts)
    from unimatrix.kernels.passes.gated_sum_native import sum_gated_native

    return sum_gated_native(gates, contexts)


def apply_gated_unit(gate_and_up: Tensor, *, backend: str = "auto") -> Tensor:
    """Return SiLU of the first half of the features times the second.

    Equation: E23.
    Source: Shazeer 2020 (arXiv:2002.05202), SwiGLU.

    Args:
        gate_and_up: [..., 2 F] any float.
        backend: ``auto``, ``reference`` or ``native``.

    Returns:
        [..., F].
    """
    if not runs_native(backend, gate_and_up):
        return reference.apply_gated_unit(gate_and_up)
    from unimatrix.kernels.passes.gated_unit_native import apply_gated_unit_native

    return apply_gated_unit_native(gate_and_up)


def convolve_recent(
    h: Tensor, weight: Tensor, recent: Tensor | None, *, backend: str = "auto"
) -> Tensor:
    """Mix each channel over the last K tokens, the current one included.

    Equation: E19.
    Source: the short convolution of Mamba (arXiv:2312.00752), without an activation.

    Args:
        h: [B, T, D] any float.
        weight: [K, D], the current token's filter last.
        recent: [B, K - 1, D], features of the tokens before; ``None`` is zeros.
        backend: ``auto``, ``reference`` or ``native``.

    Returns:
        [B, T, D].

    Raises:
        InputError: if the shapes do not fit.
    """
    num_taps, width = weight.shape
    if recent is None:
        recent = h.new_zeros(h.shape[0], num_taps - 1, width)
    if h.shape[2] != width or recent.shape != (h.shape[0], num_taps - 1, width):
        raise InputError(
            f"h is {list(h.shape)}, weight {list(weight.shape)} and recent {list(recent.shape)}; "
            "pass [B, T, D], [K, D] and [B, K - 1, D]"
        )
    if not runs_native(backend, h, weight, recent):
        return reference.convolve_recent(h, weight, recent)
    from unimatrix.kernels.passes.convolution_native import convolve_recent_native

    return convolve_recent_native(h, weight, recent)
