"""A depth step of compiled passes: all of it as one operator, or as many of its parts as can be."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from unimatrix.kernels.explain import (
    Form,
    explain_layers,
    explain_module,
    explain_norm,
    explain_sizes,
    explain_weights,
)
from unimatrix.kernels.passes.weights import PassWeights
from unimatrix.nn.block import States, UniMatrixBlock
from unimatrix.nn.feed_forward import FeedForward, GatedFeedForward
from unimatrix.nn.matrix_mixer import NUM_RULES, MatrixMixer, MatrixState
from unimatrix.nn.mixer import Tokens, Votes
from unimatrix.nn.short_convolution import ShortConvolution
from unimatrix.ops.matrix_state.fused_scan import bind_and_scan, fuses_scan

if TYPE_CHECKING:
    from unimatrix.kernels.passes.depth_step_native import DepthStep

Layer = Callable[[Tensor], Tensor]
_MOST_CONTEXTS = 3


def build_norm_run(norm: nn.Module, name: str, like: Tensor, reasons: dict[str, str]) -> Layer:
    """Return a norm as one compiled pass, or the module and the reason.

    Args:
        norm: of ``build_norm``.
        name: of the part, for the reason.
        like: a weight of the device and type that kernels read.
        reasons: by part; one is added where the module is returned.
    """
    reason = explain_norm(name, norm, like)
    if reason is None and isinstance(norm, nn.LayerNorm):
        reason = f"{name} is a layer norm, which torch computes in one pass"
    if reason is None and torch.compiler.is_compiling():
        reason = "torch.compile joins its operations"
    if reason is not None:
        reasons[name] = reason
        return norm
    # Imported here: it loads the compiler.
    from unimatrix.kernels.passes.row_norm_native import normalize_rows_native

    assert isinstance(norm, nn.RMSNorm)
    assert norm.eps is not None
    weight, eps = norm.weight, norm.eps
    return lambda x: normalize_rows_native(x, weight, eps)


@dataclass(eq=False)
class BlockRun:
    """``UniMatrixBlock.forward`` by compiled passes.

    Attributes:
        block: whose weights they are.
        norm, ffn_norm: of the stream, where they are no part of a pass.
        projections: of norm, convolution and the matrix mixer's projections.
        mixing: of the readout's projection, the gates and their sum.
        feed_forward: of norm and feed-forward network.
        step: all three and the scan as one operator.
        matrix_is_plain: whether the matrix mixer is called as its class says: its layers may then
            be called here.
        dtype: of the stream.
    """

    block: UniMatrixBlock
    norm: Layer
    ffn_norm: Layer
    projections: PassWeights | None
    mixing: PassWeights | None
    feed_forward: PassWeights | None
    step: "DepthStep | None"
    matrix_is_plain: bool
    dtype: torch.dtype

    def __post_init__(self) -> None:
        self._joined: dict[str, Layer] = {}
        # The contexts of mixers that read once, and the same as the last depth step returned them:
        # handed on from step to step, they have their gradients summed inside the passes.
        self._read_contexts: list[Tensor] = []
        self._passed_contexts: list[Tensor] = []

    def __call__(
        self, x: Tensor, tokens: Tokens, carry: States
    ) -> tuple[Tensor, States, Votes | None]:
        """Apply one depth step; as ``UniMatrixBlock.forward``."""
        block, reads = self.block, dict(tokens.reads)
        if x.dtype != self.dtype or not _are_like(x, [read.context for read in reads.values()]):
            return block(x, tokens, carry)  # type: ignore[no-any-return]
        matrix = block.matrix_mixer
        others = [mixer for mixer in block.mixers if mixer is not matrix]
        is_known = all(mixer.name in reads for mixer in others)
        if self.step is not None and is_known and len(reads) < _MOST_CONTEXTS:
            x, h, states = self._apply_step(self.step, x, tokens, carry)
        else:
            x, h, states = self._apply_parts(x, tokens, carry, reads)
        votes = None
        for mixer in others:
            if tokens.is_last and mixer.votes:
                votes = mixer.vote(h, reads[mixer.name])
        x = x if tokens.modulation is None else x * tokens.modulation
        return x, states, votes

    def _apply_step(
        self, step: "DepthStep", x: Tensor, tokens: Tokens, carry: States
    ) -> tuple[Tensor, Tensor, States]:
        """Apply all parts as one operator; return the stream, its norm before and the states."""
        # Imported here: it loads the compiler.
        from unimatrix.kernels.passes.depth_step_native import apply_depth_step_native

        mixer = self.block.matrix_mixer
        assert mixer is not None
        names = [name for name in self.block.gates if name in tokens.reads]
        contexts = [tokens.reads[name].context for name in names]
        is_same = len(contexts) == len(self._read_contexts) and all(
            ours is theirs for ours, theirs in zip(contexts, self._read_contexts, strict=True)
        )
        if not is_same:
            self._read_contexts = self._passed_contexts = contexts
        matrix_state, recent = carry.get(mixer.name) or (None, None)
        x, h, matrix_state, self._passed_contexts = apply_depth_step_native(
            step, x, recent, matrix_state, self._passed_contexts, tokens.lengths
        )
        if mixer.short_conv is not None:
            recent = mixer.short_conv.take_recent(h, recent, tokens.lengths)
        return x, h, {mixer.name: MatrixState(matrix_state, recent)}

    def _apply_parts(
        self, x: Tensor, tokens: Tokens, carry: States, reads: dict[str, Any]
    ) -> tuple[Tensor, Tensor, States]:
        """Apply part after part, each a pass or its modules; what mixers read is added to reads."""
        block = self.block
        states: States = {}
        matrix: Any = block.matrix_mixer
        h, readout = None, None
        if matrix is not None and self.matrix_is_plain:
            h, readout, states[matrix.name] = self._read_matrix(x, tokens, carry.get(matrix.name))
        h = self.norm(x) if h is None else h
        for mixer in block.mixers:
            if mixer.reads_at is None and mixer.name not in states:
                reads[mixer.name], states[mixer.name] = mixer(h, tokens, carry.get(mixer.name))
        contexts = {n: reads[n].context for n in block.gates if n in reads}
        is_whole = len(contexts) + (readout is not None) == len(block.gates)
        is_whole = is_whole and _are_like(x, contexts.values())
        if self.mixing is not None and readout is not None and is_whole:
            # Imported here, as wherever a pass runs: it loads the compiler.
            from unimatrix.kernels.passes.mixing_native import add_mixed_native

            x = add_mixed_native(x, h, [readout, *contexts.values()], self.mixing)
        else:
            if readout is not None:
                contexts = {matrix.name: matrix.out_proj(readout), **contexts}
            x = x + block.dropout(self._sum_gated(h, contexts)) if contexts else x
        if self.feed_forward is not None:
            from unimatrix.kernels.passes.feed_forward_native import add_feed_forward_native

            x = add_feed_forward_native(x, self.feed_forward)
        else:
            x = x + block.dropout(self._apply_network(self.ffn_norm(x)))
        return x, h, states

    def _read_matrix(
        self, x: Tensor, tokens: Tokens, state: MatrixState | None
    ) -> tuple[Tensor, Tensor, MatrixState]:
        """Return the norm of the stream, the readout before its projection, and the state."""
        mixer = self.block.matrix_mixer
        assert mixer is not None
        matrix_state, recent = (None, None) if state is None else state
        if self.projections is not None:
            from unimatrix.kernels.passes.projection_native import project_native

            h, vectors, controls = project_native(
                x, recent, self.projections, squashes=mixer.squashes
            )
            if mixer.short_conv is not None:
                recent = mixer.short_conv.take_recent(h, recent, tokens.lengths)
        else:
            h = mixed = self.norm(x)
            if mixer.short_conv is not None:
                mixed, recent = self._convolve(mixer.short_conv, h, recent, tokens.lengths)
            vectors = self._join(_list_vectors(mixer, h.shape[-1]))(mixed)
            controls = self._join(_list_controls(mixer, h.shape[-1]))(h)
        is_bound = self.projections is not None and mixer.squashes
        if can_fuse_scan(mixer, h, h.shape[1]):
            readout, matrix_state = bind_and_scan(
                vectors.view(*h.shape[:2], -1, mixer.num_heads, mixer.head_dim),
                controls,
                unit=mixer.normalized_keys,
                bound=is_bound,
                initial_state=matrix_state,
                lengths=tokens.lengths,
            )
            readout = readout.flatten(2)
        else:
            readout, matrix_state = mixer.scan(
                vectors, controls, matrix_state, tokens.lengths, is_bound=is_bound
            )
        return h, readout, MatrixState(matrix_state, recent)

    def _convolve(
        self, convolution: ShortConvolution, h: Tensor, recent: Tensor | None, lengths: Any
    ) -> tuple[Tensor, Tensor]:
        """Convolve in one pass, or as the module does."""
        reason = _explain_convolution(convolution, h)
        if reason is not None or torch.compiler.is_compiling():
            mixed: tuple[Tensor, Tensor] = convolution(h, recent, lengths)
            return mixed
        # Imported here: it loads the compiler.
        from unimatrix.kernels.passes.convolution_native import convolve_recent_native

        before = recent
        if before is None:
            before = h.new_zeros(h.shape[0], convolution.kernel - 1, h.shape[2])
        convolved = convolve_recent_native(h, convolution.weight, before)
        return convolved, convolution.take_recent(h, recent, lengths)

    def _sum_gated(self, h: Tensor, contexts: dict[str, Tensor]) -> Tensor:
        """Return the gated sum of the contexts (E11)."""
        forms = {
            n: form for n, form in _list_gates(self.block, h.shape[-1]).items() if n in contexts
        }
        is_one_pass = len(contexts) <= _MOST_CONTEXTS and _are_like(h, contexts.values())
        is_one_pass = is_one_pass and not torch.compiler.is_compiling()
        if not is_one_pass or explain_layers(forms, h) is not None:
            read = [torch.sigmoid(forms[n].layer(h)) * context for n, context in contexts.items()]
            return sum(read[1:], read[0])
        # Imported here: it loads the compiler.
        from unimatrix.kernels.passes.gated_sum_native import sum_gated_native

        return sum_gated_native(self._join(forms)(h), list(contexts.values()))

    def _apply_network(self, h: Tensor) -> Tensor:
        """Return the feed-forward network's output."""
        network = self.block.feed_forward
        reason = explain_module("feed_forward", network, GatedFeedForward)
        forms = {} if reason is not None else _list_network(network, h.shape[-1])
        up = {name: form for name, form in forms.items() if form.layer is not network.down_proj}
        reason = reason or explain_layers(up, h)
        if reason is not None or torch.compiler.is_compiling():
            output: Tensor = network(h)
            return output
        # Imported here: it loads the compiler.
        from unimatrix.kernels.passes.gated_unit_native import apply_gated_unit_native

        inner = apply_gated_unit_native(self._join(up)(h))
        down: Layer = network.down_proj
        return down(network.dropout(inner))

    def _join(self, forms: dict[str, Form]) -> Layer:
        """Return layers of one input as one product, joined once for all depth steps.

        Layers of another form are called, and their outputs laid side by side.
        """
        name = ",".join(forms)
        if name not in self._joined:
            self._joined[name] = _join_layers(forms)
        return self._joined[name]


def _join_layers(forms: dict[str, Form]) -> Layer:
    layers: list[Any] = [form.layer for form in forms.values()]
    like = getattr(layers[0], "weight", None)
    if len(layers) == 1:
        only: Layer = layers[0]
        return only
    if like is None or explain_layers(forms, like) is not None:
        return lambda h: torch.cat([layer(h) for layer in layers], dim=-1)
    weight = torch.cat([layer.weight for layer in layers])
    bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
    return lambda h: linear(h, weight, bias)


def _are_like(x: Tensor, contexts: Iterable[Tensor]) -> bool:
    """Return whether contexts have the shape and type that kernels take them to have."""
    return all(context.shape == x.shape and context.dtype == x.dtype for context in contexts)


def _list_vectors(mixer: MatrixMixer, width: int) -> dict[str, Form]:
    """Return the layers of what a token binds and asks for, by name."""
    shape = (mixer.num_heads * mixer.head_dim, width)
    return _name_forms("block.matrix_mixer", mixer, mixer.vector_layers, shape, has_bias=False)


def _list_controls(mixer: MatrixMixer, width: int) -> dict[str, Form]:
    """Return the layers of what decides how a token is written, by name."""
    shape = (mixer.num_heads, width)
    forms = _name_forms("block.matrix_mixer", mixer, mixer.control_layers, shape, has_bias=True)
    rules = (NUM_RULES * mixer.num_heads, width)
    return {n: f._replace(shape=rules) if "rule_proj" in n else f for n, f in forms.items()}


def _list_gates(block: UniMatrixBlock, width: int) -> dict[str, Form]:
    """Return the gates by the mixer's name."""
    return {name: Form(gate, (width, width), True) for name, gate in block.gates.items()}


def _list_network(network: FeedForward | GatedFeedForward, width: int) -> dict[str, Form]:
    """Return the layers of a feed-forward network, by name."""
    inner, has_bias = network.inner_size, isinstance(network, FeedForward)
    up, down = network.up_projs, [network.down_proj]
    return _name_forms(
        "block.feed_forward", network, up, (inner, width), has_bias=has_bias
    ) | _name_forms("block.feed_forward", network, down, (width, inner), has_bias=has_bias)


def _name_forms(
    prefix: str, owner: nn.Module, layers: Sequence[Any], shape: tuple[int, int], *, has_bias: bool
) -> dict[str, Form]:
    """Return layers of one shape by their full names."""
    names = {id(layer): name for name, layer in owner._modules.items()}
    return {f"{prefix}.{names[id(layer)]}": Form(layer, shape, has_bias) for layer in layers}


def _explain_convolution(convolution: ShortConvolution, like: Tensor) -> str | None:
    """Return why passes cannot read a short convolution, ``None`` if they can."""
    name, weight = "block.matrix_mixer.short_conv", convolution.weight
    reason = explain_module(name, convolution, ShortConvolution)
    reason = reason or explain_weights(name, [weight], like)
    if reason is None and weight.shape != (convolution.kernel, like.shape[-1]):
        reason = f"the weight of {name} is {list(weight.shape)}"
    return reason


def build_block_run(
    block: UniMatrixBlock,
    like: Tensor,
    num_tokens: int,
    most_weights: float,
    reasons: dict[str, str],
) -> BlockRun:
    """Return a block's depth step with as many of its parts in compiled passes as can be.

    Args:
        block: called as its class says.
        like: a weight of the device and type that kernels read.
        num_tokens: T.
        most_weights: of one pass.
        reasons: by part; one is added for each part whose modules are called.
    """
    drops = explain_module("block.dropout", block.dropout, nn.Dropout)
    if drops is None and block.training and block.dropout.p > 0:
        drops = "dropout is on"
    matrix: Any = block.matrix_mixer
    not_bare: str | None = "there is no matrix state"
    if matrix is not None:
        not_bare = explain_module("block.matrix_mixer", matrix, MatrixMixer)
    parts: dict[str, Any] = {
        "projections": not_bare or _join_projections(block, like, most_weights),
        "mixing": not_bare or drops or _join_mixing(block, like, most_weights),
        "feed_forward": drops or _join_feed_forward(block, like, most_weights),
    }
    parts["step"] = _join_step(matrix, parts, like, num_tokens)
    passes = {n: None if isinstance(part, str) else part for n, part in parts.items()}
    reasons |= {f"block.{n}": part for n, part in parts.items() if isinstance(part, str)}
    norm: Layer = block.norm
    if passes["projections"] is None:
        norm = build_norm_run(block.norm, "block.norm", like, reasons)
    ffn_norm: Layer = block.ffn_norm
    if passes["feed_forward"] is None:
        ffn_norm = build_norm_run(block.ffn_norm, "block.ffn_norm", like, reasons)
    return BlockRun(
        block, norm, ffn_norm, **passes, matrix_is_plain=not_bare is None, dtype=like.dtype
    )


def _join_projections(block: UniMatrixBlock, like: Tensor, most: float) -> PassWeights | str:
    """Return norm, convolution and projections as one pass, or why they cannot be."""
    norm, mixer = block.norm, block.matrix_mixer
    assert mixer is not None
    filters = mixer.short_conv
    reason = explain_norm("block.norm", norm, like)
    if filters is not None:
        reason = reason or _explain_convolution(filters, like)
    vectors = _list_vectors(mixer, like.shape[-1])
    controls = _list_controls(mixer, like.shape[-1])
    forms: dict[str, Any] = {**vectors, **controls}
    reason = reason or explain_layers(forms, like)
    if reason is None:
        weights = [norm.weight, *(form.layer.weight for form in forms.values())]
        widths = (like.shape[-1], sum(form.shape[0] for form in vectors.values()))
        reason = explain_sizes("the pass", weights, most, widths)
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


def _join_mixing(block: UniMatrixBlock, like: Tensor, most: float) -> PassWeights | str:
    """Return the readout's projection and the gates as one pass, or why they cannot be."""
    assert block.matrix_mixer is not None
    mixer, width = block.matrix_mixer, like.shape[-1]
    out, inner = mixer.out_proj, mixer.num_heads * mixer.head_dim
    gates: dict[str, Any] = _list_gates(block, width)
    if len(gates) > _MOST_CONTEXTS:
        return f"{len(gates)} mixers are more than {_MOST_CONTEXTS}"
    named = {f"the gate of block.{name}": gate for name, gate in gates.items()}
    forms = {"block.matrix_mixer.out_proj": Form(out, (width, inner), False), **named}
    reason = explain_layers(forms, like)
    layers = [gate.layer for gate in gates.values()]
    if reason is None:
        weights = [out.weight, *(layer.weight for layer in layers)]
        reason = explain_sizes("the pass", weights, most, (width, inner))
    if reason is not None:
        return reason
    from unimatrix.kernels.passes.mixing_native import prepare_mixing

    return prepare_mixing(out.weight, [g.weight for g in layers], [g.bias for g in layers])


def _join_feed_forward(block: UniMatrixBlock, like: Tensor, most: float) -> PassWeights | str:
    """Return norm and feed-forward network as one pass, or why they cannot be."""
    norm, network = block.ffn_norm, block.feed_forward
    reason = explain_module("block.feed_forward", network, FeedForward, GatedFeedForward)
    if reason is not None:
        return reason
    if network.training and network.dropout.p:
        return "dropout is on"
    forms: dict[str, Any] = _list_network(network, like.shape[-1])
    reason = (
        explain_norm("block.ffn_norm", norm, like)
        or explain_module("block.feed_forward.dropout", network.dropout, nn.Dropout)
        or explain_layers(forms, like)
    )
    if reason is None:
        weights = [norm.weight, *(form.layer.weight for form in forms.values())]
        reason = explain_sizes("the pass", weights, most, (like.shape[-1],))
    if reason is not None:
        return reason
    from unimatrix.kernels.passes.feed_forward_native import prepare_feed_forward

    assert norm.eps is not None
    up = [layer.weight for layer in network.up_projs]
    shift = norm.bias if isinstance(norm, nn.LayerNorm) else None
    down, bias = network.down_proj, network.up_projs[0].bias
    return prepare_feed_forward(norm.weight, shift, norm.eps, up, bias, down.weight, down.bias)


def _join_step(
    mixer: MatrixMixer, parts: dict[str, Any], like: Tensor, num_tokens: int
) -> "DepthStep | str":
    """Return the three passes and the scan as one operator, or why they cannot be."""
    for name, part in parts.items():
        if isinstance(part, str):
            return f"{name} is no pass"
    if torch.compiler.is_compiling():
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
