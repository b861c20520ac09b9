"""Which model is timed: a name and fields, from which any process builds the same one."""

import contextlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from unimatrix.baselines.sizes import find_size
from unimatrix.bench.peers import TIMED_PEERS
from unimatrix.configuration import UniMatrixConfig
from unimatrix.errors import InputError
from unimatrix.modeling import UniMatrixForCausalLM
from unimatrix.train.recipe import PRECISIONS

# Of widths that are no multiple of it a GPU's products are slower.
_WIDTH_MULTIPLE = 8
_FARTHEST = 0.1  # from the parameters asked for, as a share of them
# What a fair comparison needs: any length, and the peers have no dropout.
_SHARED = {"max_position_embeddings": None, "dropout": 0.0}


DTYPES = {name: getattr(torch, name) for name in PRECISIONS}
"""Dtypes of matrix products by precision, as in ``train.precision``: weights stay float32."""

COMPILER = "inductor"
"""The back end of ``torch.compile`` that ``train.compile`` takes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchModel:
    """A model to be timed.

    Attributes:
        name: a preset, or a key of ``TIMED_PEERS``.
        overrides: configuration fields of a UniMatrix; peers take the sizes among them.
        compiler: back end of ``torch.compile`` for its train steps; ``None`` is eager execution.
        precision: a key of ``DTYPES``.
    """

    name: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    compiler: str | None = None
    precision: str = "float32"

    @property
    def label(self) -> str:
        """What its rows are called."""
        return self.name if self.compiler is None else f"{self.name}, compiled"

    @property
    def is_peer(self) -> bool:
        """Whether another library ships it."""
        return self.name in TIMED_PEERS

    @property
    def cache_name(self) -> str:
        """Under which name it takes and returns what it carries from call to call."""
        return TIMED_PEERS[self.name].cache_name if self.is_peer else "past_key_values"

    def cast_products(self, device: torch.device) -> AbstractContextManager[object]:
        """Return the context in which it is called, that of autocast unless in float32."""
        if self.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=DTYPES[self.precision])

    def make_config(self) -> UniMatrixConfig:
        """Return the configuration; of a peer, that of the UniMatrix whose sizes it shares.

        Raises:
            InputError: for an unknown preset or field, or an unusable value.
        """
        fields = {**_SHARED, **self.overrides}
        if self.is_peer:
            return UniMatrixConfig(**fields)
        return UniMatrixConfig.preset(self.name, **fields)

    def build(self, *, max_tokens: int, seed: int, device: str) -> PreTrainedModel:
        """Return the model with fresh float32 weights, the same for the same seed.

        Args:
            max_tokens: the longest sequence it will see.
            seed: of the weights.
            device: cpu, cuda, mps, or meta, which draws none.
        """
        config = self.make_config()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            if not self.is_peer:
                return UniMatrixForCausalLM(config).to(device)
            peer = TIMED_PEERS[self.name]
            inner_size = self.overrides.get("intermediate_size") if peer.feeds_forward else None
            model: PreTrainedModel = peer.build(
                config, max_tokens=max_tokens, inner_size=inner_size
            )
        return model.to(device)

    def explain_absence(self, num_tokens: int, device: str) -> str | None:
        """Return why the model cannot see sequences of this length here, ``None`` if it can."""
        if self.is_peer:
            return TIMED_PEERS[self.name].explain_absence(device)
        rows = self.make_config().max_position_embeddings
        if rows is not None and num_tokens > rows:
            return f"its position table has {rows:,} rows"
        return None

    def describe_training(self) -> str:
        """Return what the train step of the model optimizes."""
        config = self.make_config()
        if self.is_peer or config.associative_memory != "selective":
            return "cross entropy"
        slots = f"{config.num_slots:,} slots" if config.bounded_training else "unbounded slots"
        return f"cross entropy, hindsight by {config.hindsight}, {slots}"

    def describe(self) -> dict[str, Any]:
        """Return its label, its fields and what its train step optimizes, as JSON types."""
        training = self.describe_training()
        return {"name": self.label, "overrides": dict(self.overrides), "training": training}


def match_parameters(models: Sequence[BenchModel]) -> list[BenchModel]:
    """Return the models with peers made as large as the first preset, in parameters.

    Layers and the number of heads stay; a peer gets the width at which its usual shape comes
    nearest, a multiple of 8 H, and the feed-forward width that makes up for the rest, a multiple of
    8. Mamba-2 has no such network and heads of its own: a multiple of 8 comes as near as it can.

    Raises:
        InputError: if the nearest size of a peer is more than a tenth away.
    """
    target = _count_parameters(next(model for model in models if not model.is_peer))
    return [_resize(model, target) if model.is_peer else model for model in models]


def _resize(model: BenchModel, target: int) -> BenchModel:
    """Return a peer with as many parameters; as it is where its library is not installed."""
    peer = TIMED_PEERS[model.name]
    if not peer.is_installed:
        return model

    def set_size(hidden_size: int, inner_size: int) -> BenchModel:
        fields = {"hidden_size": hidden_size, "intermediate_size": inner_size}
        return replace(model, overrides={**model.overrides, **fields})

    heads = model.make_config().num_attention_heads if peer.feeds_forward else 1
    size = find_size(
        lambda *sizes: _count_parameters(set_size(*sizes)),
        target,
        ratio=peer.inner_ratio,
        multiple=_WIDTH_MULTIPLE * heads,
        inner_multiple=_WIDTH_MULTIPLE,
    )
    resized = set_size(size.hidden_size, size.inner_size)
    found = _count_parameters(resized)
    if abs(found - target) > _FARTHEST * target:
        raise InputError(
            f"{model.name} has no size with about {target:,} parameters (nearest: {found:,} at "
            f"width {size.hidden_size}); leave it out, or change the preset's sizes by --set"
        )
    return resized


def _count_parameters(model: BenchModel) -> int:
    """Return a model's parameters, without drawing them."""
    with torch.device("meta"):
        built = model.build(max_tokens=1, seed=0, device="meta")
    return sum(parameter.numel() for parameter in built.parameters())
