"""The models of a comparison, made equally large."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from transformers import PreTrainedModel

from unimatrix.baselines.peers import PEERS
from unimatrix.baselines.sizes import NARROWEST_INNER, Size, find_size
from unimatrix.configuration import UniMatrixConfig
from unimatrix.errors import InputError
from unimatrix.modeling import UniMatrixForCausalLM
from unimatrix.studies.compare.recipe import Comparison, ModelEntry
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
        return draw_model(
            lambda: _build(self.entry, self.size, self.comparison), self.comparison.seed
        )

    def build_for_recall(self, task: AssociativeRecall) -> PreTrainedModel:
        """Return the model of the task's vocabulary, otherwise of the same size.

        Args:
            task: decides vocabulary and the length of a position table.
        """
        fields: dict[str, Any] = {
            "vocab_size": task.vocab_size,
            "pad_token_id": task.PAD_ID,
            "bos_token_id": task.BOS_ID,
            "eos_token_id": None,
        }
        return draw_model(
            lambda: _build(
                self.entry,
                self.size,
                self.comparison,
                fields | self.entry.recall_overrides,
                max_tokens=task.window_tokens,
            ),
            self.comparison.seed,
        )


def plan_models(comparison: Comparison) -> list[ModelMaker]:
    """Choose the size of every chosen model: as many parameters as the first model has.

    Raises:
        InputError: for an unusable configuration, or if a model cannot have that many parameters to
            within one per cent.
    """
    first = next(iter(comparison.models.values()))
    target = count_first(comparison)
    makers = []
    for name, entry in comparison.chosen.items():
        _require_automaton(name, entry)
        size = _read_size(entry) if entry is first else _find_size(name, entry, comparison, target)
        makers.append(ModelMaker(name, entry, size, comparison))
    return makers


def _require_automaton(name: str, entry: ModelEntry) -> None:
    """Raise unless a model whose automaton is carried has one."""
    path = _configure(entry).residual_path if entry.carried_automaton else "suffix_automaton"
    if path != "suffix_automaton":
        raise InputError(
            f"model {name!r} has no suffix automaton (residual_path is {path!r}); leave "
            "carried_automaton out"
        )


def count_first(comparison: Comparison) -> int:
    """Return the parameters of the first model as its recipe has it."""
    first = next(iter(comparison.models.values()))
    return _count(first, _read_size(first), comparison)


def _find_size(name: str, entry: ModelEntry, comparison: Comparison, target: int) -> Size:
    """Return the size at which a model has ``target`` parameters, to within one per cent.

    Raises:
        InputError: if there is no such size; it names the model.
    """

    def count(hidden_size: int, inner_size: int) -> int:
        return _count(entry, Size(hidden_size, inner_size), comparison)

    if entry.peer is not None:
        peer = PEERS[entry.peer]
        ratio, multiple = peer.inner_ratio, peer.width_multiple * comparison.num_heads
    else:
        config = _configure(entry)
        ratio = config.intermediate_size / config.hidden_size
        multiple = config.num_attention_heads
    size = find_size(count, target, ratio=ratio, multiple=multiple)
    nearest = count(size.hidden_size, size.inner_size)
    if abs(nearest - target) > PARAMETER_TOLERANCE * target:
        raise InputError(
            f"model {name!r} has no size with {target:,} parameters (nearest: {nearest:,} at width "
            f"{size.hidden_size}); change num_layers or num_heads, or make the first model larger"
        )
    return size


def _configure(entry: ModelEntry) -> UniMatrixConfig:
    """Return the configuration that one of ours states."""
    assert entry.preset is not None
    return UniMatrixConfig.preset(entry.preset, **entry.overrides)


def _read_size(entry: ModelEntry) -> Size:
    """Return the size of the first model: what ours states, and a usual one of a peer."""
    if entry.peer is not None:
        inner_ratio = PEERS[entry.peer].inner_ratio
        return Size(_PEER_WIDTH, max(NARROWEST_INNER, round(_PEER_WIDTH * inner_ratio)))
    config = _configure(entry)
    return Size(config.hidden_size, config.intermediate_size)


def _count(entry: ModelEntry, size: Size, comparison: Comparison) -> int:
    """Return the parameters of a model of bytes, without drawing its weights."""
    with torch.device("meta"):
        model = _build(entry, size, comparison)
    return sum(parameter.numel() for parameter in model.parameters())


def _build(
    entry: ModelEntry,
    size: Size,
    comparison: Comparison,
    fields: Mapping[str, Any] = MappingProxyType({}),
    *,
    max_tokens: int | None = None,
) -> PreTrainedModel:
    """Return a model; nothing drops out, and none of ours has a position table."""
    if entry.preset is not None:
        shape = {"hidden_size": size.hidden_size, "intermediate_size": size.inner_size}
        changes = {**entry.overrides, **shape, **_COMMON_FIELDS, **fields}
        return UniMatrixForCausalLM(UniMatrixConfig.preset(entry.preset, **changes))
    assert entry.peer is not None
    config = UniMatrixConfig(
        hidden_size=size.hidden_size,
        num_hidden_layers=comparison.num_layers,
        num_attention_heads=comparison.num_heads,
        dropout=0.0,
        **fields,
    )
    return PEERS[entry.peer].build(
        config,
        max_tokens=comparison.text.window_tokens if max_tokens is None else max_tokens,
        inner_size=size.inner_size,
    )
