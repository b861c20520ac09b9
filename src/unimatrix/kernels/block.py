"""A depth step of compiled passes: all of it as one operator, or as many of its parts as can be."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from unimatrix.kernels.block_weights import (
    MOST_CONTEXTS,
    can_fuse_scan,
    explain_convolution,
    join_feed_forward,
    join_mixing,
    join_projections,
    join_step,
    list_controls,
    list_gates,
    list_network,
    list_vectors,
)
from unimatrix.kernels.explain import Form, explain_layers, explain_module, explain_norm
from unimatrix.kernels.passes.weights import PassWeights
from unimatrix.nn.block import States, UniMatrixBlock
from unimatrix.nn.feed_forward import GatedFeedForward
from unimatrix.nn.matrix_mixer import MatrixMixer, MatrixState
from unimatrix.nn.mixer import Tokens, Votes
from unimatrix.nn.short_convolution import ShortConvolution
from unimatrix.ops.matrix_state.fused_scan import bind_and_scan

if TYPE_CHECKING:
    from unimatrix.kernels.passes.depth_step_native import DepthStep

Layer = Callable[[Tensor], Tensor]


def build_norm_run(norm: nn.Module, name: str, like: Tensor, reasons: dict[str, str]) -> Layer:
    """Return a norm as one compiled pass; or the module, and add the reason to ``reasons``."""
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
        if self.step is not None and is_known and len(reads) < MOST_CONTEXTS:
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
            vectors = self._join(list_vectors(mixer, h.shape[-1]))(mixed)
            controls = self._join(list_controls(mixer, h.shape[-1]))(h)
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
        reason = explain_convolution(convolution, h)
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
            n: form for n, form in list_gates(self.block, h.shape[-1]).items() if n in contexts
        }
        is_one_pass = len(contexts) <= MOST_CONTEXTS and _are_like(h, contexts.values())
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
        forms = {} if reason is not None else list_network(network, h.shape[-1])
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
        "projections": not_bare or join_projections(block, like, most_weights),
        "mixing": not_bare or drops or join_mixing(block, like, most_weights),
        "feed_forward": drops or join_feed_forward(block, like, most_weights),
    }
    parts["step"] = join_step(matrix, parts, like, num_tokens)
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
