"""Projections and gate around the dense associative memory."""

from torch import Tensor

from unimatrix.configuration import UniMatrixConfig
from unimatrix.nn.associative_projections import AssociativeProjections
from unimatrix.nn.previous_token import shift_to_previous
from unimatrix.ops.dense_memory import DenseMemory, read_dense_memory


class DenseMixer(AssociativeProjections):
    """Read from every earlier (key of i - 1, value of i); the memory grows with the sequence.

    Equation: E5.
    Source: paper, section on Assoc.

    Args:
        config: uses D, C and K.
    """

    def __init__(self, config: UniMatrixConfig) -> None:
        super().__init__(config)
        self.topk = config.slots_per_read

    def retrieve(
        self,
        source: Tensor,
        writable: Tensor,
        *,
        previous: Tensor | None,
        dense: DenseMemory | None,
        lengths: Tensor | None,
    ) -> tuple[Tensor, DenseMemory]:
        """Read at every position, then append.

        Args:
            source: [B, T, D], token embeddings or the normalised stream.
            writable: [B, T] bool, whether the position has a predecessor.
            previous: [B, D], source feature of the token before the first; ``None`` is none.
            dense: the pairs so far; ``None`` is none.
            lengths: [B] int64, real tokens of each row; ``None`` is T for all.

        Returns:
            [B, T, D], what each position read; the pairs including these T.
        """
        before = shift_to_previous(source, previous)  # [B, T, D]
        return read_dense_memory(
            self.query_proj(source),
            self.key_proj(before),
            self.value_proj(source),
            writable=writable,
            topk=self.topk,
            initial=dense,
            lengths=lengths,
            backend=self.backend,
        )
