"""The one block of weights that every depth step applies."""

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from unimatrix.configuration import UniMatrixConfig
from unimatrix.kernels.passes import (
    add_feed_forward,
    add_mixed,
    project,
    sum_gated,
)
from unimatrix.kernels.passes.weights import PassWeights
from unimatrix.nn.checkpointing import Checkpoint, checkpoint_nested
from unimatrix.nn.dense_mixer import DenseMixer
from unimatrix.nn.feed_forward import build_feed_forward
from unimatrix.nn.fusion import fuse_feed_forward, fuse_mixing, fuse_projections, fuse_step
from unimatrix.nn.matrix_mixer import MatrixMixer
from unimatrix.nn.norm import build_norm
from unimatrix.nn.packed_linear import PackedWeights, apply_together, pack
from unimatrix.nn.previous_token import take_last
from unimatrix.nn.selective_mixer import SelectiveMixer, SelectiveRead, SelectiveState
from unimatrix.nn.slot_mixer import SlotMixer
from unimatrix.ops.dense_memory import DenseMemory
from unimatrix.ops.slots import SlotRead, SlotState

if TYPE_CHECKING:
    from unimatrix.kernels.passes.depth_step_native import DepthStep


class Sequence(NamedTuple):
    """What every depth step sees of the tokens, real tokens first in each row.

    Attributes:
        token_ids: [B, T] int64.
        writable: [B, T] bool, whether the position has a predecessor.
        lengths: [B] int64, real tokens of each row; ``None`` is T for all.
        residual_context: [B, T, D] or ``None``.
        modulation: [B, T, D] or ``None``.
        match: the automaton's predicted ids and match lengths, [B, T] int64 each, or ``None``.
    """

    token_ids: Tensor
    writable: Tensor
    lengths: Tensor | None
    residual_context: Tensor | None
    modulation: Tensor | None
    match: tuple[Tensor, Tensor] | None = None


class Associations(NamedTuple):
    """Bindings carried from call to call, by one depth step or by all of them.

    Attributes:
        previous: [B, D], source feature of the last real token, where the source is hidden.
        slots: the slots, where the model has them.
        dense: the pairs of the dense associative memory, where the model has one.
        selective: selective slots and the recent tokens, where the model has them.
    """

    previous: Tensor | None = None
    slots: SlotState | None = None
    dense: DenseMemory | None = None
    selective: SelectiveState | None = None


class Retrieval(NamedTuple):
    """What the positions read from slots or dense associative memory.

    Attributes:
        context: [B, T, D].
        read: ids and weights for the pointer, with slots.
        selective: what was found, with selective slots.
    """

    context: Tensor
    read: SlotRead | None
    selective: SelectiveRead | None = None


class DepthCarry(NamedTuple):
    """What one depth step carries from call to call.

    Attributes:
        matrix_state: [B, H, N, N], where the model has one.
        recent: [B, K - 1, D], normalised streams of the last tokens, with a short convolution over
            K tokens.
        associations: bindings, where their source is hidden.
    """

    matrix_state: Tensor | None = None
    recent: Tensor | None = None
    associations: Associations = Associations()


class BlockWeights(NamedTuple):
    """Weights of the block that depth steps share, side by side as they are applied.

    Attributes:
        matrix_mixer: what the matrix mixer packs.
        projections: of norm and matrix mixer, where they run as one pass.
        mixing: of the gates and the readout's projection, where they run as one pass.
        gates: of all mixers together, where they do not.
        feed_forward: of norm and feed-forward network, where they run as one pass.
        step: all three passes and the scan, where they run as one operator.
    """

    matrix_mixer: tuple[PackedWeights | None, PackedWeights | None] = (None, None)
    projections: PassWeights | None = None
    mixing: PassWeights | None = None
    gates: PackedWeights | None = None
    feed_forward: PassWeights | None = None
    step: "DepthStep | None" = None


class UniMatrixBlock(GradientCheckpointingLayer):
    """Mix tokens (matrix state, associations, residual context), then feed forward.

    Equation: E11 (sum of gated mixers), E12 (modulation).

    Whoever enables checkpointing sets ``gradient_checkpointing`` and
    ``_gradient_checkpointing_func``, as on every layer of transformers.

    Args:
        config: see ``UniMatrixConfig``.
    """

    def __init__(self, config: UniMatrixConfig) -> None:
        super().__init__()
        self.backend = "auto"
        width = config.hidden_size
        self.norm = build_norm(config)
        self.matrix_mixer = MatrixMixer(config) if config.update_rules != "none" else None
        self.slot_mixer = SlotMixer(config) if config.associative_memory == "slots" else None
        self.dense_mixer = DenseMixer(config) if config.associative_memory == "dense" else None
        self.selective_mixer = None
        if config.associative_memory == "selective":
            self.selective_mixer = SelectiveMixer(config)
        self.reads_hidden = config.slot_source == "hidden" and self.selective_mixer is None
        has_residual = config.residual_path != "none"
        self.context_gate = nn.Linear(width, width) if has_residual else None
        self.dropout = nn.Dropout(config.dropout)
        self.ffn_norm = build_norm(config)
        self.feed_forward = build_feed_forward(config)

    @property
    def _gradient_checkpointing_func(self) -> Checkpoint:
        return partial(checkpoint_nested, self._checkpoint)

    @_gradient_checkpointing_func.setter
    def _gradient_checkpointing_func(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    @_gradient_checkpointing_func.deleter
    def _gradient_checkpointing_func(self) -> None:
        del self._checkpoint

    @property
    def _association_mixer(self) -> SlotMixer | DenseMixer | SelectiveMixer | None:
        return self.slot_mixer or self.dense_mixer or self.selective_mixer

    def _list_gates(self, *, reads: bool) -> list[nn.Linear]:
        """Return the layers of the mixers' gates, with the associations' or without."""
        gates = []
        if self.matrix_mixer is not None:
            gates.append(self.matrix_mixer.residual_gate)
        if reads:
            mixer = self._association_mixer
            assert mixer is not None
            gates.append(mixer.read_gate)
        if self.context_gate is not None:
            gates.append(self.context_gate)
        return gates

    def pack(self, x: Tensor) -> BlockWeights:
        """Return the weights that ``forward`` applies together, for several depth steps.

        Args:
            x: [B, T, D], the residual stream before any of them.
        """
        layers = self._list_gates(reads=self._association_mixer is not None)
        projections = fuse_projections(self.norm, self.matrix_mixer, x, self.backend)
        drops = self.training and self.dropout.p > 0
        mixer = self.matrix_mixer if projections is None else None
        mixing = None if drops else fuse_mixing(self.matrix_mixer, layers, x, self.backend)
        feed_forward = None
        if not drops:
            feed_forward = fuse_feed_forward(self.ffn_norm, self.feed_forward, x, self.backend)
        return BlockWeights(
            matrix_mixer=(None, None) if mixer is None else mixer.pack(),
            projections=projections,
            mixing=mixing,
            gates=pack(layers) if layers and mixing is None else None,
            feed_forward=feed_forward,
            step=fuse_step(self.matrix_mixer, (projections, mixing, feed_forward), x),
        )

    def retrieve(
        self, source: Tensor, sequence: Sequence, associations: Associations
    ) -> tuple[Retrieval | None, Associations]:
        """Read and write the associations once, from the given source features.

        Args:
            source: [B, T, D].
            sequence: the tokens.
            associations: bindings so far; ``previous`` is the last source feature.

        Returns:
            what was read (``None`` without associations), and the bindings afterwards.
        """
        lengths, previous = sequence.lengths, associations.previous
        if self.slot_mixer is not None:
            read, slots = self.slot_mixer.retrieve(
                source,
                sequence.token_ids,
                sequence.writable,
                previous=previous,
                slots=associations.slots,
                lengths=lengths,
            )
            last = take_last(source, lengths, previous)
            return Retrieval(read.context, read), Associations(last, slots=slots)
        if self.dense_mixer is not None:
            context, dense = self.dense_mixer.retrieve(
                source,
                sequence.writable,
                previous=previous,
                dense=associations.dense,
                lengths=lengths,
            )
            last = take_last(source, lengths, previous)
            return Retrieval(context, None), Associations(last, dense=dense)
        return None, associations

    def forward(
        self,
        x: Tensor,
        sequence: Sequence,
        carry: DepthCarry,
        retrieval: Retrieval | None,
        is_last: bool,
        weights: BlockWeights | None = None,
    ) -> tuple[Tensor, DepthCarry, tuple[Tensor, Tensor] | None, Sequence, Retrieval | None]:
        """Apply one depth step.

        Args:
            x: [B, T, D], the residual stream.
            sequence: the tokens.
            carry: what this depth step carried here.
            retrieval: what was read by the token source; ``None`` reads from the hidden source.
            is_last: whether this is the last depth step, the one whose pointer votes.
            weights: from ``pack``; without, every depth step packs its own.

        Returns:
            the stream, the carry after the last real token, the pointer's ids and gated weights
            ([B, T, K] each; ``None`` without pointer and before the last depth step); ``sequence``
            and ``retrieval``, to go on with.
        """
        weights = self.pack(x) if weights is None else weights
        knows_reads = retrieval is not None or self._association_mixer is None
        if weights.step is not None and knows_reads:
            x, h, carry, sequence, retrieval = self._apply_whole(
                weights.step, x, sequence, carry, retrieval
            )
        else:
            x, h, carry, sequence, retrieval = self._apply_parts(
                weights, x, sequence, carry, retrieval
            )
        pointer = None
        read = None if retrieval is None else retrieval.read
        if is_last and self.slot_mixer is not None and read is not None:
            pointer = self.slot_mixer.weigh_pointer(h, read)
        if sequence.modulation is not None:
            x = x * sequence.modulation
        return x, carry, pointer, sequence, None if self.reads_hidden else retrieval

    def _apply_whole(
        self,
        step: "DepthStep",
        x: Tensor,
        sequence: Sequence,
        carry: DepthCarry,
        retrieval: Retrieval | None,
    ) -> "_Applied":
        """Apply all parts as one compiled operator."""
        # Imported here: it loads the compiler.
        from unimatrix.kernels.passes.depth_step_native import apply_depth_step_native

        assert self.matrix_mixer is not None
        contexts = _list_contexts(sequence, retrieval)
        x, h, matrix_state, contexts = apply_depth_step_native(
            step, x, carry.recent, carry.matrix_state, contexts, sequence.lengths
        )
        recent = self.matrix_mixer.take_recent(h, carry.recent, sequence.lengths)
        carry = DepthCarry(matrix_state, recent, carry.associations)
        return _Applied(x, h, carry, *_put_contexts(contexts, sequence, retrieval))

    def _apply_parts(
        self,
        weights: BlockWeights,
        x: Tensor,
        sequence: Sequence,
        carry: DepthCarry,
        retrieval: Retrieval | None,
    ) -> "_Applied":
        """Apply part after part, each a compiled pass or its modules."""
        matrix_state, recent, associations = carry
        projected = None
        if weights.projections is not None:
            assert self.matrix_mixer is not None
            squashes = self.matrix_mixer.squashes
            h, *projected = project(x, recent, weights.projections, squashes=squashes)
        else:
            h = self.norm(x)
        contexts = []
        if self.matrix_mixer is not None:
            readout, matrix_state, recent = self.matrix_mixer(
                h, matrix_state, recent, sequence.lengths, weights.matrix_mixer, projected
            )
            contexts.append(readout)
        if self.reads_hidden:
            retrieval, associations = self.retrieve(h, sequence, associations)
        contexts += _list_contexts(sequence, retrieval)
        # Before the first read there is a gate less than is packed.
        reads = retrieval is not None
        is_whole = reads or self._association_mixer is None
        if weights.mixing is not None and is_whole:
            x = add_mixed(x, h, contexts, weights.mixing)
        elif contexts:
            if self.matrix_mixer is not None:
                contexts[0] = self.matrix_mixer.out_proj(contexts[0])
            gates = apply_together(
                self._list_gates(reads=reads), h, weights.gates if is_whole else None
            )
            x = x + self.dropout(sum_gated(gates, contexts, backend=self.backend))
        if weights.feed_forward is not None:
            x = add_feed_forward(x, weights.feed_forward)
        else:
            x = x + self.dropout(self.feed_forward(self.ffn_norm(x)))
        carry = DepthCarry(matrix_state, recent, associations)
        return _Applied(x, h, carry, sequence, retrieval)


class _Applied(NamedTuple):
    """What a depth step leaves: the stream, its norm before, and the others to go on with."""

    x: Tensor
    h: Tensor
    carry: DepthCarry
    sequence: Sequence
    retrieval: Retrieval | None


def _list_contexts(sequence: Sequence, retrieval: Retrieval | None) -> list[Tensor]:
    """Return what is mixed in beside the readout of the matrix state."""
    contexts = [] if retrieval is None else [retrieval.context]
    return contexts if sequence.residual_context is None else [*contexts, sequence.residual_context]


def _put_contexts(
    contexts: list[Tensor], sequence: Sequence, retrieval: Retrieval | None
) -> tuple[Sequence, Retrieval | None]:
    """Return both with contexts from ``_list_contexts`` to go on with."""
    if sequence.residual_context is not None:
        *contexts, residual_context = contexts
        sequence = sequence._replace(residual_context=residual_context)
    if retrieval is not None:
        retrieval = retrieval._replace(context=contexts[0])
    return sequence, retrieval
