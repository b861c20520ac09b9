"""Which model is timed: a name and fields, from which any process builds the same one."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from unimatrix.bench.peers import TIMED_PEERS
from unimatrix.configuration import UniMatrixConfig
from unimatrix.modeling import UniMatrixForCausalLM

# What a fair comparison needs: any length, and the peers have no dropout.
_SHARED = {"max_position_embeddings": None, "dropout": 0.0}


COMPILER = "inductor"
"""The back end of ``torch.compile`` that ``train.compile`` takes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchModel:
    """A model to be timed.

    Attributes:
        name: a preset, or a key of ``TIMED_PEERS``.
        overrides: configuration fields of a UniMatrix; peers take the sizes among them.
        compiler: back end of ``torch.compile`` for its train steps; ``None`` is eager execution.
    """

    name: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    compiler: str | None = None

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
            device: cpu, cuda or mps.
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
        """Return why the model cannot see sequences of this length here, ``None`` if it can.

        Args:
            num_tokens: T.
            device: cpu, cuda or mps.
        """
        if self.is_peer:
            return TIMED_PEERS[self.name].explain_absence(device)
        rows = self.make_config().max_position_embeddings
        if rows is not None and num_tokens > rows:
            return f"its position table has {rows:,} rows"
        return None

    def describe_training(self) -> str:
        """Return what the train step of the model optimizes."""
        if self.is_peer:
            return "cross entropy"
        config = self.make_config()
        if config.associative_memory != "selective":
            return "cross entropy"
        slots = f"{config.num_slots:,} slots" if config.bounded_training else "unbounded slots"
        return f"cross entropy, hindsight by {config.hindsight}, {slots}"
