"""A model's weights in one array, in the order and shape that the compiled step reads them."""

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unimatrix.configuration import UniMatrixConfig
from unimatrix.kernels.step import layout
from unimatrix.nn.block import UniMatrixBlock
from unimatrix.nn.indexed_attention import IndexedAttention
from unimatrix.nn.selective_mixer import normalize_features
from unimatrix.ops.selective_slots import CODES_PER_NAT

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class StepWeights:
    """What the compiled step knows of a model.

    Attributes:
        config: of the model, a copy: the model may be resized while the weights here stay.
        arrays: weights; starts of the weights; sizes; columns of what is projected from the stream;
            numbers; contexts (to read, to write, read offsets). ``layout.py`` numbers them.
    """

    config: UniMatrixConfig
    arrays: tuple[Any, ...]

    @property
    def dtype(self) -> torch.dtype:
        """The type of weights, logits and floating state."""
        return torch.float64 if self.arrays[0].dtype == np.float64 else torch.float32


class _Packer:
    """Collects weights and notes which parameters they came from."""

    def __init__(self, model: nn.Module) -> None:
        self.parts: dict[int, Tensor] = {}
        self.packed: set[int] = set()
        self._model = model

    def take(self, parameter: Tensor) -> Tensor:
        """Return a parameter, noted as packed."""
        self.packed.add(id(parameter))
        return parameter.detach()

    def add(self, index: int, parameter: Tensor | None) -> None:
        """Pack a table or a vector as it is; ``None`` is left out."""
        if parameter is not None:
            self.parts[index] = self.take(parameter)

    def add_linear(self, weight: int, bias: int | None, *linears: nn.Linear) -> None:
        """Pack layers that share their input as one matrix [inputs, outputs] and its bias."""
        self.parts[weight] = torch.cat([self.take(linear.weight) for linear in linears]).mT
        if any(linear.bias is not None for linear in linears):
            assert bias is not None
            self.parts[bias] = torch.cat(
                [
                    self.take(linear.bias)
                    if linear.bias is not None
                    else linear.weight.new_zeros(linear.out_features)
                    for linear in linears
                ]
            )

    def add_norm(self, weight: int, bias: int, norm: nn.Module) -> None:
        """Pack a norm's scale and, if it has one, its bias."""
        assert isinstance(norm, nn.LayerNorm | nn.RMSNorm)
        self.add(weight, norm.weight)
        self.add(bias, norm.bias if isinstance(norm, nn.LayerNorm) else None)

    def join(self) -> tuple[Array, Array]:
        """Return the weights in one array, and where each begins (-1: absent)."""
        missing = [n for n, p in self._model.named_parameters() if id(p) not in self.packed]
        assert not missing, f"the compiled step leaves out {missing}"
        starts = np.full(layout.NUM_WEIGHTS, -1, dtype=np.int64)
        position = 0
        for index, part in self.parts.items():
            starts[index] = position
            position += part.numel()
        flat = torch.cat([part.reshape(-1) for part in self.parts.values()])
        return flat.numpy(), starts


def pack_step(model: Any) -> StepWeights:
    """Copy a model's weights for the compiled step.

    Args:
        model: a ``UniMatrixForCausalLM`` that ``explain_step`` finds nothing against.

    Returns:
        the weights; later changes of the model do not reach it.
    """
    config, inner, block = copy.deepcopy(model.config), model.model, model.model.block
    packer = _Packer(model)
    with torch.no_grad():
        packer.add(layout.EMBED, inner.embed_tokens.weight)
        packer.add_linear(layout.HEAD, None, model.lm_head)
        packer.add_norm(layout.FINAL_NORM, layout.FINAL_NORM_BIAS, inner.norm)
        if inner.embed_positions is not None:
            packer.add(layout.POSITIONS, inner.embed_positions.weight)
        if inner.embed_depth is not None:
            packer.add(layout.DEPTH, inner.embed_depth.weight)
        if inner.residual_context is not None:
            packer.add(layout.CONTEXT, inner.residual_context.embed.weight)
        if inner.token_modulation is not None:
            every_id = torch.arange(config.vocab_size).unsqueeze(0)
            packer.parts[layout.MODULATION] = inner.token_modulation(every_id)
            for parameter in inner.token_modulation.parameters():
                packer.take(parameter)
        _add_block(packer, block)
        if block.indexed_attention is not None:
            _add_index(packer, block.indexed_attention, inner.embed_tokens.weight)
        _add_mixture(packer, inner.pointer_mixture)
        parts, num_projected = _add_projections(packer, block)
        weights, starts = packer.join()
    sizes = _list_sizes(config, block)
    sizes[layout.NUM_PROJECTED] = num_projected
    if config.automaton_pointer:
        sizes[layout.NUM_LENGTH_BUCKETS] = inner.pointer_mixture.length_score.num_embeddings
    numbers = np.array(
        [config.layer_norm_eps, config.match_threshold, config.strength_floor], dtype=np.float64
    )
    patterns = _list_patterns(config.slot_key_patterns)
    offsets = np.array(config.slot_read_offsets, dtype=np.int64)
    return StepWeights(
        config, (weights, starts, sizes, parts, numbers, (patterns, patterns, offsets))
    )


def _add_block(packer: _Packer, block: UniMatrixBlock) -> None:
    """Pack what the block has beside its projections from the stream."""
    packer.add_norm(layout.NORM, layout.NORM_BIAS, block.norm)
    packer.add_norm(layout.FFN_NORM, layout.FFN_NORM_BIAS, block.ffn_norm)
    network: Any = block.feed_forward
    if hasattr(network, "gate_proj"):
        packer.add_linear(layout.UP, None, network.gate_proj, network.up_proj)
    else:
        packer.add_linear(layout.UP, layout.UP_BIAS, network.up_proj)
    packer.add_linear(layout.DOWN, layout.DOWN_BIAS, network.down_proj)
    if block.matrix_mixer is not None:
        packer.add_linear(layout.OUTPUT, None, block.matrix_mixer.out_proj)
        if block.matrix_mixer.short_conv is not None:
            packer.add(layout.CONV, block.matrix_mixer.short_conv.weight)
    slots: Any = block.slot_mixer
    if slots is not None:
        for index, linear in (
            (layout.QUERY, slots.query_proj),
            (layout.KEY, slots.key_proj),
            (layout.VALUE, slots.value_proj),
        ):
            if isinstance(linear, nn.Linear):
                packer.add_linear(index, None, linear)
        if slots.write_gate is not None:
            packer.add_linear(layout.WRITE_GATE, layout.WRITE_GATE_BIAS, slots.write_gate)
    selective = block.selective_mixer
    if selective is not None:
        packer.add_linear(layout.GATE_UP, layout.GATE_UP_BIAS, selective.gate_up)
        packer.add_linear(layout.GATE_DOWN, layout.GATE_DOWN_BIAS, selective.gate_down)
        packer.add(layout.READ_SCORE, selective.read_score)
        packer.add_linear(layout.VALUE, None, selective.value_proj)


def _add_index(packer: _Packer, mixer: IndexedAttention, embeddings: Tensor) -> None:
    """Pack the indexed attention, and what it makes of every token of the vocabulary alone."""
    features = normalize_features(embeddings)
    squares = embeddings.square().mean(dim=1)
    packer.parts[layout.FEATURE_SCALE] = (squares + torch.finfo(squares.dtype).eps).rsqrt()
    packer.parts[layout.PLACE_VALUES] = features @ packer.take(mixer.value_proj.weight).mT
    packer.parts[layout.KEY_CONV] = packer.take(mixer.key_conv).mT
    packer.add_linear(layout.KEY_MIX, layout.KEY_MIX_BIAS, mixer.key_mix)
    packer.add_linear(layout.PLACE_KEY, None, mixer.key_proj)
    queries, biases = (
        (mixer.query_proj, mixer.unit_query_proj),
        (mixer.offset_bias, mixer.kind_bias),
    )
    asked = (*queries, *biases, mixer.nothing_score)
    packer.add_linear(layout.PLACE_QUERY, layout.PLACE_QUERY_BIAS, *asked)
    packer.add(layout.UNIT_KIND, mixer.unit_kind.weight)
    temperatures = (mixer.log_temperature, mixer.unit_log_temperature)
    packer.parts[layout.TEMPERATURE] = torch.stack([packer.take(t) for t in temperatures]).exp()
    packer.add(layout.COUNT_BIAS, mixer.count_bias.weight)
    packer.add(layout.AGE_BIAS, mixer.age_bias.weight)
    packer.add(layout.MATCH_BIAS, mixer.match_bias)
    packer.add_linear(layout.PLACE_OUTPUT, None, mixer.out_proj)
    if mixer.boundary is not None:
        boundary = packer.take(mixer.boundary)
        values = packer.parts[layout.PLACE_VALUES].view(len(embeddings), mixer.num_heads, -1)
        own, before = boundary[:, :-1].chunk(2, dim=1)  # [H', C] each
        sums = [(values * own).sum(dim=-1) + boundary[:, -1], (values * before).sum(dim=-1)]
        packer.parts[layout.BOUNDARY] = torch.cat(sums, dim=1)


def _add_mixture(packer: _Packer, mixture: Any) -> None:
    """Pack the pointer mixture, if there is one."""
    if mixture is None:
        return
    scores = [mixture.slot_score, mixture.automaton_score, mixture.head_score]
    scores = [score for score in scores if score is not None]
    packer.add_linear(layout.MIXTURE, layout.MIXTURE_BIAS, *scores)
    if mixture.length_score is not None:
        packer.add(layout.LENGTH_SCORE, mixture.length_score.weight)


def _add_projections(packer: _Packer, block: UniMatrixBlock) -> tuple[Array, int]:
    """Pack everything that is projected from the normalised stream; return where each part is."""
    named: dict[int, list[nn.Linear]] = {}
    matrix = block.matrix_mixer
    if matrix is not None:
        vectors = [matrix.q_proj, matrix.k_proj, matrix.v_proj]
        named[layout.RETENTION] = [matrix.retention_proj]
        named[layout.MATRIX_GATE] = [matrix.residual_gate]
        if matrix.write_proj is not None:
            named[layout.WRITE_STRENGTH] = [matrix.write_proj]
        elif matrix.mixes_rules:
            vectors.append(matrix.diag_proj)
            named[layout.RULES] = [matrix.rule_proj]
        else:
            packer.take(matrix.diag_proj.weight)  # which nothing reads
        if matrix.short_conv is None:
            named[layout.QKVD] = vectors
        else:
            packer.add_linear(layout.VECTORS, None, *vectors)
    mixer = block.slot_mixer or block.selective_mixer or block.indexed_attention
    if mixer is not None:
        named[layout.READ_GATE] = [mixer.read_gate]
    if block.context_gate is not None:
        named[layout.CONTEXT_GATE] = [block.context_gate]
    if block.slot_mixer is not None and block.slot_mixer.pointer_gate is not None:
        named[layout.POINTER_GATE] = [block.slot_mixer.pointer_gate]
    parts = np.full(layout.WRITE_STRENGTH + 1, -1, dtype=np.int64)
    position = 0
    for index, linears in named.items():
        parts[index] = position
        position += sum(linear.out_features for linear in linears)
    linears = [linear for group in named.values() for linear in group]
    if linears:
        packer.add_linear(layout.INPUT, layout.INPUT_BIAS, *linears)
    return parts, position


def _list_sizes(config: UniMatrixConfig, block: UniMatrixBlock) -> Array:
    """Return sizes and choices in the order of ``layout``."""
    selective, is_indexed = block.selective_mixer, block.indexed_attention is not None
    num_reads = 0 if selective is None else selective.num_reads
    if block.slot_mixer is not None:
        num_reads = min(config.slots_per_read, config.num_slots)
    memories = {"none": layout.NO_ASSOCIATIONS, "slots": layout.SLOTS, "indexed": layout.INDEXED}
    paths = {"none": layout.NO_CONTEXT, "previous_token": layout.PREVIOUS_TOKEN}
    sizes = {
        layout.HIDDEN_SIZE: config.hidden_size,
        layout.NUM_DEPTH_STEPS: config.num_hidden_layers,
        layout.NUM_HEADS: config.num_attention_heads,
        layout.HEAD_DIM: config.head_dim,
        layout.INNER_SIZE: config.intermediate_size,
        layout.LAYER_NORM: config.norm_type == "layer_norm",
        layout.GATED: config.feed_forward_type == "swiglu",
        layout.HAS_MATRIX: block.matrix_mixer is not None,
        layout.MIXES_RULES: config.update_rules == "mixed",
        layout.NORM_GUARD: config.norm_guard,
        layout.NORMALIZED_KEYS: config.normalized_keys,
        layout.CONTEXT_PATH: paths.get(config.residual_path, layout.AUTOMATON),
        layout.PAD_ID: config.pad_token_id,
        layout.ASSOCIATIONS: memories.get(config.associative_memory, layout.SELECTIVE),
        layout.FROM_HIDDEN: config.slot_source == "hidden",
        layout.POINTER_VOTES: config.uses_pointer,
        layout.NUM_READS: num_reads,
        layout.NUM_SLOT_SCORES: num_reads if selective is not None and config.pointer else 0,
        layout.AUTOMATON_SCORE: config.automaton_pointer,
        layout.MARGIN: round(config.slot_margin * CODES_PER_NAT),
        layout.KEEP_FIRST: config.repeated_key == "first",
        layout.FADE_TOKENS: config.slot_fade_tokens or 0,
        layout.USES_DELTA: config.update_rules == "delta",
        layout.INDEX_HEADS: config.index_heads if is_indexed else 0,
        layout.INDEX_HEAD_DIM: config.index_head_dim,
        layout.INDEX_READS_AT: config.index_reads_at,
        layout.NUM_HEAD_SCORES: config.index_heads if is_indexed and config.pointer else 0,
    }
    array = np.zeros(layout.NUM_SIZES, dtype=np.int64)
    array[list(sizes)] = [int(size) for size in sizes.values()]
    return array


def _list_patterns(patterns: list[list[int]]) -> Array:
    """Return contexts as distances back [patterns, longest], -1 behind the last of each."""
    array = np.full((len(patterns), max(map(len, patterns))), -1, dtype=np.int64)
    for row, pattern in zip(array, patterns, strict=True):
        row[: len(pattern)] = pattern
    return array
