"""The models of a comparison, made equally large."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from unimatrix.baselines.peers import PEERS
from unimatrix.baselines.sizes import NARROWEST_INNER, Size, find_size
from unimatrix.configuration import UniMatrixConfig
from unimatrix.errors import InputError
from unimatrix.modeling import UniMatrixForCausalLM
from unimatrix.studies.compare.recipe import Comparison, ModelEntry
from unimatrix.studies.recall.run import describe_vocabulary
from unimatrix.studies.seeds import draw_model
from unimatrix.tasks import AssociativeRecall

PARAMETER_TOLERANCE = 0.01
"""How far a model's parameters may lie from the number asked for."""
# Of ours: no dropout, as in every peer, and no position table.
_COMMON_FIELDS: dict[str, Any] = {"dropout": 0.0, "max_position_embeddings": None}
# Of a peer that stands first, so that nothing states its size.
_PEER_WIDTH = 64


@dataclass(frozen=True)
class ModelMaker:
    """A model of a comparison at its chosen size, ready to be built for text or for recall.

    Attributes:
        name: in the tables.
        entry: what it is.
        size: what was chosen.
        comparison: layers, heads and seed.
    """

    name: str
    entry: ModelEntry
    size: Size
    comparison: Comparison

    @property
    def automaton_window(self) -> int | None:
        """The bound of its suffix automaton, one of ours that has one."""
        window: int | None = _configure(self.entry).automaton_window
        return window

    def build_for_text(self) -> PreTrainedModel:
        """Return the model of bytes with weights drawn from the comparison's seed."""
        window_tokens = self.comparison.text.window_tokens
        return draw_model(lambda: self._build(window_tokens), self.comparison.seed)

    def build_for_recall(self, task: AssociativeRecall) -> PreTrainedModel:
        """Return the model of the task's vocabulary and length, otherwise of the same size."""
        fields = describe_vocabulary(task) | self.entry.recall_overrides
        return draw_model(lambda: self._build(task.window_tokens, **fields), self.comparison.seed)

    def count(self) -> int:
        """Return the parameters of the model of bytes, without drawing its weights."""
        with torch.device("meta"):
            model = self._build(self.comparison.text.window_tokens)
        return sum(parameter.numel() for parameter in model.parameters())

    def _build(self, max_tokens: int, **fields: Any) -> PreTrainedModel:
        """Return a model; nothing drops out, and none of ours has a position table."""
        entry, size = self.entry, self.size
        if entry.preset is not None:
            shape = {"hidden_size": size.hidden_size, "intermediate_size": size.inner_size}
            changes = {**entry.overrides, **shape, **_COMMON_FIELDS, **fields}
            return UniMatrixForCausalLM(UniMatrixConfig.preset(entry.preset, **changes))
        assert entry.peer is not None
        config = UniMatrixConfig(
            hidden_size=size.hidden_size,
            num_hidden_layers=self.comparison.num_layers,
            num_attention_heads=self.comparison.num_heads,
            dropout=0.0,
            **fields,
        )
        return PEERS[entry.peer].build(config, max_tokens=max_tokens, inner_size=size.inner_size)


def plan_models(comparison: Comparison) -> list[ModelMaker]:
    """Choose the size of every chosen model: as many parameters as the first model has.

    Raises:
        InputError: for an unusable configuration, or if a model cannot have that many parameters to
            within one per cent.
    """
    first, target = _make_first(comparison), count_first(comparison)
    for name, entry in comparison.chosen.items():
        if entry.carried_automaton:
            _require_automaton(name, entry)
    return [
        first
        if name == first.name
        else _fit(ModelMaker(name, entry, first.size, comparison), target)
        for name, entry in comparison.chosen.items()
    ]


def count_first(comparison: Comparison) -> int:
    """Return the parameters of the first model as its recipe has it."""
    return _make_first(comparison).count()


def _make_first(comparison: Comparison) -> ModelMaker:
    """Return the first model, at the size that ours states, or at a usual one of a peer."""
    name, entry = next(iter(comparison.models.items()))
    if entry.peer is not None:
        inner_size = round(_PEER_WIDTH * PEERS[entry.peer].inner_ratio)
        size = Size(_PEER_WIDTH, max(NARROWEST_INNER, inner_size))
    else:
        config = _configure(entry)
        size = Size(config.hidden_size, config.intermediate_size)
    return ModelMaker(name, entry, size, comparison)


def _fit(maker: ModelMaker, target: int) -> ModelMaker:
    """Return a model at the size at which it has ``target`` parameters, to within one per cent.

    Raises:
        InputError: if there is no such size.
    """

    def count(hidden_size: int, inner_size: int) -> int:
        return replace(maker, size=Size(hidden_size, inner_size)).count()

    if maker.entry.peer is not None:
        peer = PEERS[maker.entry.peer]
        ratio, multiple = peer.inner_ratio, peer.width_multiple * maker.comparison.num_heads
    else:
        config = _configure(maker.entry)
        ratio = config.intermediate_size / config.hidden_size
        multiple = config.num_attention_heads
    size = find_size(count, target, ratio=ratio, multiple=multiple)
    nearest = count(size.hidden_size, size.inner_size)
    if abs(nearest - target) > PARAMETER_TOLERANCE * target:
        raise InputError(
            f"model {maker.name!r} has no size with {target:,} parameters (nearest: {nearest:,} at "
            f"width {size.hidden_size}); change num_layers or num_heads, or make the first model "
            "larger"
        )
    return replace(maker, size=size)


def _require_automaton(name: str, entry: ModelEntry) -> None:
    path = _configure(entry).residual_path
    if path != "suffix_automaton":
        raise InputError(
            f"model {name!r} has no suffix automaton (residual_path is {path!r}); leave "
            "carried_automaton out"
        )


def _configure(entry: ModelEntry) -> UniMatrixConfig:
    """Return the configuration that one of ours states."""
    assert entry.preset is not None
    return UniMatrixConfig.preset(entry.preset, **entry.overrides)
