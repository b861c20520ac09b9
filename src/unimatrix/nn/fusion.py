"""Which parts of a model run as one compiled pass each.

A part does where all its modules are no more than their weights (no hook, no adapter), nothing is
dropped inside, and ``fuses_products`` takes its sizes. Else the modules are called.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from unimatrix.kernels.passes import fuses_products
from unimatrix.kernels.passes.weights import PassWeights
from unimatrix.nn.feed_forward import FeedForward, GatedFeedForward
from unimatrix.nn.matrix_mixer import MatrixMixer
from unimatrix.nn.norm import RowNorm
from unimatrix.nn.packed_linear import is_bare, is_plain
from unimatrix.ops.matrix_state.fused_scan import fuses_scan

if TYPE_CHECKING:
    from unimatrix.kernels.passes.depth_step_native import DepthStep


def fuse_projections(
    norm: nn.Module, mixer: MatrixMixer | None, x: Tensor, backend: str
) -> PassWeights | None:
    """Return norm and a mixer's projections as one pass; ``None`` where they are to be called.

    Args:
        norm: of ``build_norm``.
        mixer: its short convolution included.
        x: [B, T, D], the stream, or one like it.
        backend: of the fused passes.
    """
    if mixer is None or not isinstance(norm, RowNorm | nn.LayerNorm):
        return None
    convolution = mixer.short_conv
    whole: list[nn.Module] = [norm, mixer, *([] if convolution is None else [convolution])]
    layers = [*mixer.vector_layers, *mixer.control_layers]
    if not (all(map(is_bare, whole)) and all(map(is_plain, layers))):
        return None
    weights = [norm.weight, *(layer.weight for layer in layers)]
    num_vectors = sum(layer.out_features for layer in mixer.vector_layers)
    if not fuses_products(x, weights, backend, inner_width=num_vectors):
        return None
    # Imported here: it loads the compiler.
    from unimatrix.kernels.passes.projection_native import prepare_projections

    assert norm.eps is not None
    return prepare_projections(
        norm.weight,
        norm.bias if isinstance(norm, nn.LayerNorm) else None,
        norm.eps,
        None if convolution is None else convolution.weight,
        [layer.weight for layer in mixer.vector_layers],
        [layer.weight for layer in mixer.control_layers],
        [layer.bias for layer in mixer.control_layers],
    )


def fuse_mixing(
    mixer: MatrixMixer | None, layers: list[nn.Linear], x: Tensor, backend: str
) -> PassWeights | None:
    """Return the readout's projection and the gates as one pass; ``None`` as above.

    Args:
        mixer: whose readout it is.
        layers: of the gates, the readout's first.
        x: [B, T, D], the stream, or one like it.
        backend: of the fused passes.
    """
    if mixer is None or not all(map(is_plain, [*layers, mixer.out_proj])):
        return None
    weights = [mixer.out_proj.weight, *(layer.weight for layer in layers)]
    if not fuses_products(x, weights, backend, inner_width=mixer.out_proj.in_features):
        return None
    # Imported here: it loads the compiler.
    from unimatrix.kernels.passes.mixing_native import prepare_mixing

    gates, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    return prepare_mixing(mixer.out_proj.weight, gates, biases)


def fuse_feed_forward(
    norm: nn.Module, network: FeedForward | GatedFeedForward, x: Tensor, backend: str
) -> PassWeights | None:
    """Return norm and network as one compiled pass; ``None`` as above.

    Args:
        norm: of ``build_norm``.
        network: without the residual sum.
        x: [..., D], the stream, or one like it.
        backend: of the fused passes.
    """
    layers = [*network.up_projs, network.down_proj]
    whole = [norm, network, network.dropout]
    if not (all(map(is_bare, whole)) and all(map(is_plain, layers))):
        return None
    if not isinstance(norm, RowNorm | nn.LayerNorm) or (network.training and network.dropout.p):
        return None
    up = [layer.weight for layer in network.up_projs]
    if not fuses_products(x, [norm.weight, *up, network.down_proj.weight], backend):
        return None
    # Imported here: it loads the compiler.
    from unimatrix.kernels.passes.feed_forward_native import prepare_feed_forward

    assert norm.eps is not None
    shift = norm.bias if isinstance(norm, nn.LayerNorm) else None
    down = network.down_proj
    return prepare_feed_forward(
        norm.weight, shift, norm.eps, up, network.up_projs[0].bias, down.weight, down.bias
    )


def fuse_step(
    mixer: MatrixMixer | None,
    passes: tuple[PassWeights | None, PassWeights | None, PassWeights | None],
    x: Tensor,
) -> "DepthStep | None":
    """Return a depth step as one operator; ``None`` where not all its parts are compiled passes.

    Args:
        mixer: whose projections they are.
        passes: from the three functions above.
        x: [B, T, D], the stream, or one like it.
    """
    projections, mixing, feed_forward = passes
    if mixer is None or projections is None or mixing is None or feed_forward is None:
        return None
    # A compiler of graphs takes each pass by itself (``ops.opaque``).
    if mixer.uses_delta or mixer.norm_guard or torch.compiler.is_compiling():
        return None
    if not fuses_scan(mixer.backend, x.device, x.shape[1]):
        return None
    # Imported here: it loads the compiler.
    from unimatrix.kernels.passes.depth_step_native import DepthStep

    sizes = (mixer.num_heads, mixer.head_dim, mixer.squashes, mixer.normalized_keys)
    return DepthStep(projections, mixing, feed_forward, *sizes)


def fuse_head(head: nn.Linear, h: Tensor, backend: str) -> PassWeights | None:
    """Return the output head and the cross entropy as one pass; ``None`` as above.

    Args:
        head: without a bias.
        h: [..., D], what the head reads, or a tensor like it.
        backend: of the fused passes.
    """
    if not is_plain(head) or not fuses_products(h, [head.weight], backend):
        return None
    # Imported here: it loads the compiler.
    from unimatrix.kernels.passes.head_native import prepare_head

    return prepare_head(head.weight)
