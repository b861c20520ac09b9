"""What every way of mixing tokens offers to the block, the cache and the rest of the library."""

from collections.abc import Callable, Iterable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from unimatrix.configuration import UniMatrixConfig

Votes = tuple[Tensor, Tensor]


class Tokens(NamedTuple):
    """What mixers see of the tokens, real tokens first in each row.

    It holds no module and no weight: what offloads weights would move them with the arguments.

    Attributes:
        ids: [B, T] int64.
        embeddings: [B, T, D], before positions are added.
        embed: returns the embeddings [..., D] of ids [...].
        embed_weights: returns what it depends on, for a mixer that keeps features between calls.
        lengths: [B] int64, real tokens of each row; ``None`` is T for all.
        num_before: [B] int64, tokens of the stream before these.
        last_ids: [B] int64, the token before these, -1 where there is none.
        modulation: [B, T, D], the factors of E12, or ``None``.
        keeps_state: whether what mixers carry is returned.
        gives_up_state: whether a mixer may change in place what was carried here.
        suffix_match: [B, T, 2] int64, what followed the longest suffix that stood before, and its
            length, where a caller or a mixer knows it; ``None`` runs the suffix automaton.
        found: what a mixer has found for all of these tokens (``Mixer.search``).
        reads: by name, what mixers that read once have read.
        is_last: whether this depth step is the last, whose pointer votes.
    """

    ids: Tensor
    embeddings: Tensor
    embed: Callable[[Tensor], Tensor]
    lengths: Tensor | None
    num_before: Tensor
    last_ids: Tensor
    modulation: Tensor | None = None
    keeps_state: bool = False
    gives_up_state: bool = False
    suffix_match: Tensor | None = None
    found: Any = None
    embed_weights: Callable[[], Iterable[Tensor]] = tuple
    reads: dict[str, Any] = {}  # noqa: RUF012 - replaced, never changed
    is_last: bool = False

    @property
    def writable(self) -> Tensor:
        """Whether each position has a predecessor, [B, T] bool."""
        writable = torch.ones_like(self.ids, dtype=torch.bool)
        writable[:, 0] = self.num_before > 0
        return writable


class Read(NamedTuple):
    """What a mixer returns where it hands nothing upwards.

    Attributes:
        context: [B, T, D], gated into the stream by the block.
    """

    context: Tensor


class StateTensor(NamedTuple):
    """What a tensor of a mixer's state must be before compiled code reads it.

    Attributes:
        sizes: of its axes behind the batch.
        holds: ``floats``, ``int64``, or ``whole`` numbers of any type.
        is_ids: whether they are ids of tokens, or -1.
    """

    sizes: tuple[int, ...]
    holds: str = "floats"
    is_ids: bool = False


class Mixer(nn.Module):
    """One way of mixing tokens.

    A subclass is all that block, cache, ``info`` and the compiled paths know of it: what it reads
    and when, what it carries from call to call, and what it hands upwards.

    Attributes:
        name: of the attribute that holds it, and of its entry among reads and carried states.
        operator: the name of its operator among those of ``unimatrix.ops``; ``None`` where there is
            one form of it, and nothing to choose.
        operator_options: keyword arguments for its operator.
        State: named tuple of tensors, batch first, that it carries from call to call.
        other_states: the same, where what it carries depends on the configuration.
        state_prefix: of the tensors' names in a cache file.
        chosen_by: the configuration field that names it.
        part: what ``unimatrix info`` calls its state.
        state_device: where the state lies; ``None`` is where the model is.
        votes: whether ``vote`` returns something.
        reads_ids: whether it reads token ids, which embeddings in their place do not tell.
        reads_at: the depth step before which it reads, once for all of them; ``None`` reads at
            every depth step, from the normalised stream.
    """

    name: ClassVar[str]
    operator: ClassVar[str | None] = None
    State: ClassVar[type[Any]]
    other_states: ClassVar[tuple[type[Any], ...]] = ()
    state_prefix: ClassVar[str]
    part: ClassVar[str]
    state_device: ClassVar[str | None] = None
    chosen_by: ClassVar[str] = "associative_memory"
    kinds: ClassVar[dict[str, type["Mixer"]]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.votes = False
        self.reads_ids = self.state_device is not None  # its state is an index of the text
        self.reads_at: int | None = None
        self.operator_options: dict[str, Any] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "name" in vars(cls):
            Mixer.kinds[cls.name] = cls

    @classmethod
    def list_state_fields(cls, config: UniMatrixConfig) -> tuple[str, ...]:
        """Return the configuration fields that decide what its state holds.

        A cache is refused by a model that differs in one. Mixers newer than the format of caches
        return none where the configuration does not choose them: cache files of others stay valid.
        """
        return ()

    @classmethod
    def list_state_tensors(cls, config: UniMatrixConfig) -> dict[str, StateTensor]:
        """Return what tensors of its state must be, by their names behind ``state_prefix``.

        Those that torch alone reads need no entry.
        """
        return {}

    @property
    def runs_operator(self) -> bool:
        """Whether what it reads comes from an operator of which there are several forms."""
        return self.operator is not None

    @property
    def grows(self) -> bool:
        """Whether its state grows with the stream."""
        return False

    @property
    def gate(self) -> nn.Module:
        """The layer from [B, T, D] to the logits of the gate on what was read (E11).

        That of the residual context is the block's ``context_gate``.
        """
        raise NotImplementedError(f"{type(self).__name__} has no gate")

    def search(self, tokens: Tokens, state: Any) -> tuple[Tokens, Any]:
        """Look up what the ids alone say, once before all depth steps.

        Args:
            tokens: these tokens.
            state: a ``State`` of a mixer that reads once; ``None`` is that of an empty stream.

        Returns:
            the tokens with what was found; the state after the last real token, which ``forward``
            is given. Most mixers look up nothing.
        """
        return tokens, state

    def forward(self, source: Tensor, tokens: Tokens, state: Any) -> tuple[Any, Any]:
        """Read at every position, and write.

        Args:
            source: [B, T, D], the normalised stream of the depth step; the stream itself for a
                mixer that reads once.
            tokens: these tokens.
            state: a ``State``; ``None`` is that of an empty stream.

        Returns:
            a named tuple with ``context`` [B, T, D], and with ``scale`` (``HindsightScale``) if a
            mixer that reads once has an auxiliary loss; the state after the last real token.
        """
        raise NotImplementedError(f"{type(self).__name__} does not read")

    def vote(self, h: Tensor, read: Any) -> Votes:
        """Return what is added to the logits: ids and weights, [B, T, K] each.

        Args:
            h: [B, T, D], the normalised stream of the last depth step.
            read: what ``forward`` returned.
        """
        raise NotImplementedError(f"{type(self).__name__} does not vote")
