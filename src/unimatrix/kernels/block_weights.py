"""Which parts of a depth step are compiled passes: the layers of each, and their weights joined."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, compiler, nn

from unimatrix.kernels.explain import (
    Form,
    explain_layers,
    explain_module,
    explain_norm,
    explain_sizes,
    explain_weights,
)
from unimatrix.kernels.passes.weights import PassWeights
from unimatrix.nn.block import UniMatrixBlock
from unimatrix.nn.feed_forward import FeedForward, GatedFeedForward
from unimatrix.nn.matrix_mixer import NUM_RULES, MatrixMixer
from unimatrix.nn.short_convolution import ShortConvolution
from unimatrix.ops.matrix_state.fused_scan import fuses_scan

if TYPE_CHECKING:
    from unimatrix.kernels.passes.depth_step_native import DepthStep

MOST_CONTEXTS = 3


def list_vectors(mixer: MatrixMixer, width: int) -> dict[str, Form]:
    """Return the layers of what a token binds and asks for, by name."""
    shape = (mixer.num_heads * mixer.head_dim, width)
    return _name_forms(mixer, mixer.vector_layers, shape, has_bias=False)


def list_controls(mixer: MatrixMixer, width: int) -> dict[str, Form]:
    """Return the layers of what decides how a token is written, by name."""
    shape = (mixer.num_heads, width)
    forms = _name_forms(mixer, mixer.control_layers, shape, has_bias=True)
    rules = (NUM_RULES * mixer.num_heads, width)
    return {n: f._replace(shape=rules) if "rule_proj" in n else f for n, f in forms.items()}


def list_gates(block: UniMatrixBlock, width: int) -> dict[str, Form]:
    """Return the gates by the mixer's name."""
    return {name: Form(gate, (width, width), True) for name, gate in block.gates.items()}


def list_network(network: FeedForward | GatedFeedForward, width: int) -> dict[str, Form]:
    """Return the layers of a feed-forward network, by name."""
    inner, has_bias = network.inner_size, isinstance(network, FeedForward)
    up = _name_forms(network, network.up_projs, (inner, width), has_bias=has_bias)
    return up | _name_forms(network, [network.down_proj], (width, inner), has_bias=has_bias)


def _name_forms(
    owner: nn.Module, layers: Sequence[nn.Module], shape: tuple[int, int], *, has_bias: bool
) -> dict[str, Form]:
    """Return layers of one shape by their names in the block."""
    part = "matrix_mixer" if isinstance(owner, MatrixMixer) else "feed_forward"
    names = {id(layer): f"block.{part}.{name}" for name, layer in owner._modules.items()}
    return {names[id(layer)]: Form(layer, shape, has_bias) for layer in layers}


def explain_convolution(convolution: ShortConvolution, like: Tensor) -> str | None:
    """Return why passes cannot read a short convolution, ``None`` if they can."""
    name, weight = "block.matrix_mixer.short_conv", convolution.weight
    reason = explain_module(name, convolution, ShortConvolution)
    reason = reason or explain_weights(name, [weight], like)
    if reason is None and weight.shape != (convolution.kernel, like.shape[-1]):
        reason = f"the weight of {name} is {list(weight.shape)}"
    return reason


def join_projections(block: UniMatrixBlock, like: Tensor, most: float) -> PassWeights | str:
    """Return norm, convolution and projections as one pass, or why they cannot be."""
    norm, mixer = block.norm, block.matrix_mixer
    assert mixer is not None
    filters = mixer.short_conv
    vectors = list_vectors(mixer, like.shape[-1])
    forms: dict[str, Any] = vectors | list_controls(mixer, like.shape[-1])
    widths = (like.shape[-1], sum(form.shape[0] for form in vectors.values()))
    reason = (
        explain_norm("block.norm", norm, like)
        or (None if filters is None else explain_convolution(filters, like))
        or explain_layers(forms, like)
        or _explain_sizes([norm, *(form.layer for form in forms.values())], most, widths)
    )
    if reason is not None:
        return reason
    # Imported here, as in what follows: it loads the compiler.
    from unimatrix.kernels.passes.projection_native import prepare_projections

    assert norm.eps is not None
    return prepare_projections(
        norm.weight,
        norm.bias if isinstance(norm, nn.LayerNorm) else None,
        norm.eps,
        None if filters is None else filters.weight,
        [layer.weight for layer in mixer.vector_layers],
        [layer.weight for layer in mixer.control_layers],
        [layer.bias for layer in mixer.control_layers],
    )


def join_mixing(block: UniMatrixBlock, like: Tensor, most: float) -> PassWeights | str:
    """Return the readout's projection and the gates as one pass, or why they cannot be."""
    assert block.matrix_mixer is not None
    mixer, width = block.matrix_mixer, like.shape[-1]
    out, inner = mixer.out_proj, mixer.num_heads * mixer.head_dim
    gates: dict[str, Any] = list_gates(block, width)
    if len(gates) > MOST_CONTEXTS:
        return f"{len(gates)} mixers are more than {MOST_CONTEXTS}"
    named = {f"the gate of block.{name}": gate for name, gate in gates.items()}
    forms = {"block.matrix_mixer.out_proj": Form(out, (width, inner), False), **named}
    layers = [gate.layer for gate in gates.values()]
    reason = explain_layers(forms, like) or _explain_sizes([out, *layers], most, (width, inner))
    if reason is not None:
        return reason
    from unimatrix.kernels.passes.mixing_native import prepare_mixing

    return prepare_mixing(out.weight, [g.weight for g in layers], [g.bias for g in layers])


def join_feed_forward(block: UniMatrixBlock, like: Tensor, most: float) -> PassWeights | str:
    """Return norm and feed-forward network as one pass, or why they cannot be."""
    norm, network = block.ffn_norm, block.feed_forward
    reason = explain_module("block.feed_forward", network, FeedForward, GatedFeedForward)
    if reason is not None:
        return reason
    if network.training and network.dropout.p:
        return "dropout is on"
    forms: dict[str, Any] = list_network(network, like.shape[-1])
    reason = (
        explain_norm("block.ffn_norm", norm, like)
        or explain_module("block.feed_forward.dropout", network.dropout, nn.Dropout)
        or explain_layers(forms, like)
        or _explain_sizes([norm, *(form.layer for form in forms.values())], most, like.shape[-1:])
    )
    if reason is not None:
        return reason
    from unimatrix.kernels.passes.feed_forward_native import prepare_feed_forward

    assert norm.eps is not None
    up = [layer.weight for layer in network.up_projs]
    shift = norm.bias if isinstance(norm, nn.LayerNorm) else None
    down, bias = network.down_proj, network.up_projs[0].bias
    return prepare_feed_forward(norm.weight, shift, norm.eps, up, bias, down.weight, down.bias)


def _explain_sizes(layers: Sequence[Any], most: float, widths: Sequence[int]) -> str | None:
    """Return why a pass cannot contain layers whose products read these widths."""
    return explain_sizes("the pass", [layer.weight for layer in layers], most, widths)


def join_step(
    mixer: MatrixMixer, parts: dict[str, Any], like: Tensor, num_tokens: int
) -> "DepthStep | str":
    """Return the three passes and the scan as one operator, or why they cannot be."""
    for name, part in parts.items():
        if isinstance(part, str):
            return f"{name} is no pass"
    if compiler.is_compiling():
        return "torch.compile takes each pass by itself"
    if not can_fuse_scan(mixer, like, num_tokens):
        return "the scan does not bind its vectors itself"
    from unimatrix.kernels.passes.depth_step_native import DepthStep

    sizes = (mixer.num_heads, mixer.head_dim, mixer.squashes, mixer.normalized_keys)
    return DepthStep(parts["projections"], parts["mixing"], parts["feed_forward"], *sizes)


def can_fuse_scan(mixer: MatrixMixer, like: Tensor, num_tokens: int) -> bool:
    """Return whether one scan binds its vectors, too: there is one for these rules alone."""
    backend = mixer.operator_options.get("backend", "auto")
    is_known = mixer.update_rules in ("outer", "mixed") and not mixer.norm_guard
    return is_known and fuses_scan(backend, like.device, num_tokens)
