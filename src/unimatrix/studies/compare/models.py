"""The models of a comparison, made equally large."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from unimatrix.baselines.peers import PEERS
from unimatrix.baselines.sizes import NARROWEST_INNER, Size, find_size
from unimatrix.configuration import UniMatrixConfig
from unimatrix.errors import InputError
from unimatrix.modeling import UniMatrixForCausalLM
from unimatrix.studies.compare.recipe import Comparison, ModelEntry
from unimatrix.tasks import AssociativeRecall

PARAMETER_TOLERANCE = 0.01
"""How far a model's parameters may lie from the number asked for."""
# Of ours: no dropout, as in every peer, and no position table.
_COMMON_FIELDS: dict[str, Any] = {"dropout": 0.0, "max_position_embeddings": None}


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
        assert self.entry.preset is not None
        config = UniMatrixConfig.preset(self.entry.preset, **self.entry.overrides)
        window: int | None = config.automaton_window
        return window

    def build_for_text(self) -> PreTrainedModel:
        """Return the model of bytes with weights drawn from the comparison's seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.comparison.seed)
            return _build(self.entry, self.size, self.comparison, {})

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
        fields |= self.entry.recall_overrides
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.comparison.seed)
            return _build(
                self.entry, self.size, self.comparison, fields, max_tokens=task.window_tokens
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
    if not entry.carried_automaton or entry.preset is None:
        return
    path = UniMatrixConfig.preset(entry.preset, **entry.overrides).residual_path
    if path != "suffix_automaton":
        raise InputError(
            f"model {name!r} has no suffix automaton (residual_path is {path!r}); leave "
            "carried_automaton out"
        )


def count_first(comparison: Comparison) -> int:
    """Return the parameters of the first model as its recipe has it."""
    first = next(iter(comparison.models.values()))
    if first.peer is not None:
        size = Size(64, max(NARROWEST_INNER, round(64 * PEERS[first.peer].inner_ratio)))
    else:
        size = _read_size(first)
    return _count(first, size, comparison)


def _find_size(name: str, entry: ModelEntry, comparison: Comparison, target: int) -> Size:
    """Return the size at which a model has ``target`` parameters, to within one per cent.

    Args:
        name: of the model, for a message.
        entry: what it is.
        comparison: layers and heads.
        target: parameters wanted.

    Raises:
        InputError: if there is no such size.
    """
    ratio, multiple = _describe_shape(entry, comparison)

    def count(hidden_size: int, inner_size: int) -> int:
        return _count(entry, Size(hidden_size, inner_size), comparison)

    size = find_size(count, target, ratio=ratio, multiple=multiple)
    found = count(size.hidden_size, size.inner_size)
    if abs(found - target) > PARAMETER_TOLERANCE * target:
        raise InputError(
            f"model {name!r} has no size with {target:,} parameters (nearest: {found:,} at width "
            f"{size.hidden_size}); change num_layers or num_heads, or make the first model larger"
        )
    return size


def _describe_shape(entry: ModelEntry, comparison: Comparison) -> tuple[float, int]:
    """Return the usual inner width over D, and what D is a multiple of."""
    if entry.peer is not None:
        peer = PEERS[entry.peer]
        return peer.inner_ratio, peer.width_multiple * comparison.num_heads
    assert entry.preset is not None
    config = UniMatrixConfig.preset(entry.preset, **entry.overrides)
    return config.intermediate_size / config.hidden_size, config.num_attention_heads


def _read_size(entry: ModelEntry) -> Size:
    """Return the size that the configuration of one of ours states."""
    if entry.preset is None:
        return Size(64, max(NARROWEST_INNER, round(64 * PEERS[str(entry.peer)].inner_ratio)))
    config = UniMatrixConfig.preset(entry.preset, **entry.overrides)
    return Size(config.hidden_size, config.intermediate_size)


def _count(entry: ModelEntry, size: Size, comparison: Comparison) -> int:
    """Return the parameters of a model of bytes, without drawing its weights."""
    with torch.device("meta"):
        model = _build(entry, size, comparison, {})
    return sum(parameter.numel() for parameter in model.parameters())


def _build(
    entry: ModelEntry,
    size: Size,
    comparison: Comparison,
    fields: dict[str, Any],
    *,
    max_tokens: int | None = None,
) -> PreTrainedModel:
    """Return a model; nothing drops out, and none of ours has a position table."""
    if entry.preset is not None:
        shape = {"hidden_size": size.hidden_size, "intermediate_size": size.inner_size}
        config = UniMatrixConfig.preset(
            entry.preset,
            **(entry.overrides | shape | _COMMON_FIELDS | fields),
        )
        return UniMatrixForCausalLM(config)
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
