"""Projections and gate around the dense associative memory."""

from typing import NamedTuple

from torch import Tensor

from unimatrix.configuration import UniMatrixConfig
from unimatrix.nn.associative_projections import AssociativeProjections
from unimatrix.nn.mixer import Read, Tokens
from unimatrix.nn.previous_token import shift_to_previous, take_last
from unimatrix.ops.dense_memory import DenseMemory, read_dense_memory


class DenseState(NamedTuple):
    """What the dense associative memory carries from call to call; it grows with the stream.

    Attributes:
        previous: [B, D], source feature of the last real token.
        dense: the pairs so far.
    """

    previous: Tensor
    dense: DenseMemory


class DenseMixer(AssociativeProjections):
    """Read from every earlier (key of i - 1, value of i); the memory grows with the sequence.

    Equation: E5.
    Source: paper, section on Assoc.

    Args:
        config: uses D, C and K.
    """

    name, operator, part = "dense_mixer", "dense_memory", "dense_memory"
    State, state_prefix = DenseState, "associations."

    def __init__(self, config: UniMatrixConfig) -> None:
        super().__init__(config)
        self.topk = config.slots_per_read

    @property
    def grows(self) -> bool:
        """Every token adds a pair."""
        return True

    def forward(
        self, source: Tensor, tokens: Tokens, state: DenseState | None
    ) -> tuple[Read, DenseState]:
        """Read at every position, then append; see ``Mixer.forward``."""
        source = source if self.reads_at is None else tokens.embeddings
        previous, dense = (None, None) if state is None else state
        before = shift_to_previous(source, previous)  # [B, T, D]
        context, dense = read_dense_memory(
            self.query_proj(source),
            self.key_proj(before),
            self.value_proj(source),
            writable=tokens.writable,
            topk=self.topk,
            initial=dense,
            lengths=tokens.lengths,
            **self.operator_options,
        )
        return Read(context), DenseState(take_last(source, tokens.lengths, previous), dense)
