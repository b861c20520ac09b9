"""The one block of weights that every depth step applies."""

from typing import Any

import torch
from torch import Tensor, nn

from unimatrix.configuration import UniMatrixConfig
from unimatrix.nn.checkpointing import CheckpointedLayer
from unimatrix.nn.dense_mixer import DenseMixer
from unimatrix.nn.feed_forward import build_feed_forward, build_norm
from unimatrix.nn.indexed_attention import IndexedAttention
from unimatrix.nn.matrix_mixer import MatrixMixer
from unimatrix.nn.mixer import Mixer, Tokens, Votes
from unimatrix.nn.residual_context import ResidualContext
from unimatrix.nn.selective_mixer import SelectiveMixer
from unimatrix.nn.slot_mixer import SlotMixer

States = dict[str, Any]
"""What mixers carry from call to call: a ``Mixer.State`` by the mixer's name."""


class UniMatrixBlock(CheckpointedLayer):
    """Mix tokens through every mixer, gate what each returns into the stream, then feed forward.

    Args:
        config: see ``UniMatrixConfig``.
    """

    def __init__(self, config: UniMatrixConfig) -> None:
        super().__init__()
        memory = config.associative_memory
        self.norm = build_norm(config)
        self.matrix_mixer = MatrixMixer(config) if config.update_rules != "none" else None
        self.slot_mixer = SlotMixer(config) if memory == "slots" else None
        self.dense_mixer = DenseMixer(config) if memory == "dense" else None
        self.selective_mixer = SelectiveMixer(config) if memory == "selective" else None
        self.indexed_attention = IndexedAttention(config) if memory == "indexed" else None
        # The residual context is the model's: it is read from token ids alone.
        width, has_context = config.hidden_size, config.residual_path != "none"
        self.context_gate = nn.Linear(width, width) if has_context else None
        self.dropout = nn.Dropout(config.dropout)
        self.ffn_norm = build_norm(config)
        self.feed_forward = build_feed_forward(config)

    @property
    def mixers(self) -> list[Mixer]:
        """The mixers, in the order of E11."""
        memories = (self.slot_mixer, self.dense_mixer, self.selective_mixer, self.indexed_attention)
        return [mixer for mixer in (self.matrix_mixer, *memories) if mixer is not None]

    @property
    def gates(self) -> dict[str, nn.Module]:
        """The gate of every read by the mixer's name, in the order of E11."""
        gates = {mixer.name: mixer.gate for mixer in self.mixers}
        if self.context_gate is not None:
            gates[ResidualContext.name] = self.context_gate
        return gates

    def forward(
        self, x: Tensor, tokens: Tokens, carry: States
    ) -> tuple[Tensor, States, Votes | None]:
        """Apply one depth step.

        Equation: E11, E12, E22, E23 around those of the mixers.

        Args:
            x: [B, T, D], the residual stream.
            tokens: the tokens, with what mixers that read once have read.
            carry: what this depth step carried here.

        Returns:
            the stream; the carry after the last real token; what a pointer adds to the logits, ids
            and weights [B, T, K], at the last depth step.
        """
        reads, states, votes = dict(tokens.reads), {}, None
        h = self.norm(x)  # E22
        for mixer in self.mixers:  # E1 to E10, E13, E18
            if mixer.reads_at is None:
                read, state = mixer(h, tokens, carry.get(mixer.name))
                reads[mixer.name], states[mixer.name] = read, state
            if tokens.is_last and mixer.votes:
                assert votes is None, "one mixer votes on the logits"
                votes = mixer.vote(h, reads[mixer.name])  # E9
        gates = {name: gate for name, gate in self.gates.items() if name in reads}
        mixed = [torch.sigmoid(gate(h)) * reads[name].context for name, gate in gates.items()]
        x = x + self.dropout(sum(mixed[1:], mixed[0])) if mixed else x  # E11
        x = x + self.dropout(self.feed_forward(self.ffn_norm(x)))  # E23
        x = x if tokens.modulation is None else x * tokens.modulation  # E12
        return x, states, votes
