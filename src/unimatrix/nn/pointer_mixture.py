"""The pointer as a mixture: retrieved tokens share the probability with the vocabulary."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from unimatrix.configuration import UniMatrixConfig
from unimatrix.nn.indexed_attention import IndexedAttention, IndexedRead
from unimatrix.nn.packing import Packing
from unimatrix.nn.padding import Padding
from unimatrix.nn.residual_context import ResidualContext, ResidualRead
from unimatrix.nn.selective_mixer import SelectiveMixer, SelectiveRead
from unimatrix.ops.indexed_attention import share_heads, share_targets

# Match lengths 1, 2, 3-4, 5-8, ... share a score; the last bucket is everything longer.
NUM_LENGTH_BUCKETS = 10
_FIRST_HEAD_SCORE = -4.0


class PointerMixture(nn.Module):
    """Weigh retrieved tokens against the vocabulary's distribution.

    Equation: E17. One softmax over the components: the vocabulary with score 0, each slot found
    with its strength and a score from h, the automaton's token with a score from its match length
    and h, each head of the indexed attention with what it did not leave to nothing and a score.

    Args:
        config: uses D, ``pointer``, ``automaton_pointer`` and ``index_heads``.
        num_reads: Q, of the selective slots; 0 without them.

    Attributes:
        operator: of the shares of heads.
        operator_options: keyword arguments for it.
    """

    operator = IndexedAttention.operator

    def __init__(self, config: UniMatrixConfig, num_reads: int) -> None:
        super().__init__()
        width, is_indexed = config.hidden_size, config.associative_memory == "indexed"
        self.num_reads = num_reads
        self.slot_score = nn.Linear(width, num_reads) if num_reads else None
        self.automaton_score: nn.Linear | None = None
        self.length_score: nn.Embedding | None = None
        if config.automaton_pointer:
            self.automaton_score = nn.Linear(width, 1)
            self.length_score = nn.Embedding(NUM_LENGTH_BUCKETS, 1)
        has_heads = config.pointer and is_indexed
        self.head_score = nn.Linear(width, config.index_heads) if has_heads else None
        self.operator_options: dict[str, Any] = {}

    @property
    def runs_operator(self) -> bool:
        """Whether heads of the indexed attention share in it."""
        return self.head_score is not None

    def list_starts(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Return the parameters that start elsewhere: a head begins with a small share."""
        if self.head_score is None:
            return []
        return [(self.head_score.bias, torch.full(self.head_score.bias.shape, _FIRST_HEAD_SCORE))]

    def forward(
        self, h: Tensor, reads: Mapping[str, Any], targets: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the tokens that share the probability, and ln of the shares.

        Args:
            h: [B, T, D], what the head reads.
            reads: what mixers have read, by the mixer's name.
            targets: [B, T] int64, the only tokens whose shares are needed; ``None`` is all.

        Returns:
            token ids [B, T, K] int64; log weights [B, T, 1 + K], the vocabulary first, -inf for
            what was not found. With targets and heads K is 1: the target, and all that it is given.
        """
        ids, scores, probes = [], [torch.zeros_like(h[..., :1])], [torch.zeros_like(h[..., :1])]
        if self.slot_score is not None:
            found: SelectiveRead = reads[SelectiveMixer.name]
            ids.append(found.token_ids)
            scores.append(self.slot_score(h) + found.log_strength)
            zeros = torch.zeros_like(found.log_strength)
            probes.append(zeros if found.probe is None else found.probe + zeros)
        if self.automaton_score is not None and self.length_score is not None:
            match: ResidualRead = reads[ResidualContext.name]
            assert match.match_lengths is not None
            predicted = match.predicted_ids.unsqueeze(-1)  # [B, T, 1]
            lengths = match.match_lengths.unsqueeze(-1)
            buckets = (2 * lengths - 1).clamp_min(1).double().log2().long()
            by_length = self.length_score(buckets.clamp(max=NUM_LENGTH_BUCKETS - 1)).squeeze(-1)
            score = self.automaton_score(h) + by_length
            scores.append(score.masked_fill(predicted < 0, -torch.inf))
            probes.append(torch.zeros_like(score))
            ids.append(predicted.clamp_min(0))
        log_weights = torch.cat(scores, dim=-1)
        if self.head_score is not None:
            read: IndexedRead = reads[IndexedAttention.name]
            dtype = read.weights.dtype  # at least 32 bits
            shared = (log_weights.to(dtype), self.head_score(h).to(dtype), read.weights)
            if targets is not None:
                none = read.token_ids[..., :0]
                tokens = (torch.cat([none, *ids], dim=-1), read.token_ids, targets)
                log_weights = share_targets(*shared, *tokens, **self.operator_options)
                return targets.unsqueeze(-1), log_weights
            log_weights = share_heads(*shared, **self.operator_options)
            ids.append(read.token_ids)
            return torch.cat(ids, dim=-1), log_weights
        return torch.cat(ids, dim=-1), log_softmax(log_weights, dim=-1) + torch.cat(probes, dim=-1)


def _log(x: Tensor) -> Tensor:
    """Return ln, -inf without a gradient for 0."""
    exists = x > 0
    return x.where(exists, 1).log().masked_fill(~exists, -torch.inf)


class Pointer(NamedTuple):
    """What retrieved tokens say about the output; all ``None`` without a pointer.

    Attributes:
        token_ids: [..., K] int64.
        votes: [..., K], what each id adds to its logit; ``None`` with a mixture.
        log_weights: [..., 1 + K], ln of the shares of the vocabulary's distribution and of the
            ids; ``None`` without a mixture.
    """

    token_ids: Tensor | None = None
    votes: Tensor | None = None
    log_weights: Tensor | None = None

    def select(self, rows: Any) -> "Pointer":
        """Return the pointer of the positions that an index chooses."""
        return Pointer(*(None if part is None else part[rows] for part in self))

    def unpack(self, padding: Padding | Packing) -> "Pointer":
        """Return the pointer in the caller's columns; nothing at padding."""
        log_weights = self.log_weights
        if log_weights is not None:
            of_ids = padding.unpack(log_weights[..., 1:])
            of_ids = of_ids.masked_fill(~padding.mask.unsqueeze(-1), -torch.inf)
            log_weights = torch.cat([padding.unpack(log_weights[..., :1]), of_ids], dim=-1)
        token_ids, votes = (None if p is None else padding.unpack(p) for p in self[:2])
        return Pointer(token_ids, votes, log_weights)


class MixedLogits(NamedTuple):
    """The vocabulary's logits and the tokens that share the probability with it.

    Attributes:
        logits: [..., V].
        token_ids: [..., K] int64.
        log_weights: [..., 1 + K], sums to 1 after exponentiation; the vocabulary first.
    """

    logits: Tensor
    token_ids: Tensor
    log_weights: Tensor


def point(logits: Tensor, pointer: Pointer) -> Tensor | MixedLogits:
    """Return logits [..., V] with the votes of a pointer, or beside the shares of a mixture.

    Equation: E9, E17.

    Args:
        logits: [..., V], of the output head.
        pointer: what retrieved tokens say.
    """
    if pointer.token_ids is None:
        return logits
    if pointer.log_weights is not None:
        return MixedLogits(logits, pointer.token_ids, pointer.log_weights)
    assert pointer.votes is not None
    # Not in place: the logits are the head's, whose hooks and wrappers may keep them.
    return logits.scatter_add(-1, pointer.token_ids, pointer.votes.to(logits.dtype))


def mix_logits(mixed: MixedLogits) -> Tensor:
    """Return ln of the mixture over the whole vocabulary, [..., V].

    Of few tokens nothing of the vocabulary's size is made beside the result: those that several
    components propose are summed among the K. Of many, that would be K x K numbers, so their shares
    are summed over the vocabulary.
    """
    log_vocab = log_softmax(mixed.logits, dim=-1) + mixed.log_weights[..., :1]
    ids, log_pointer = mixed.token_ids, mixed.log_weights[..., 1:]
    if ids.shape[-1] ** 2 > log_vocab.shape[-1]:
        shares = torch.zeros_like(log_vocab).scatter_add(-1, ids, log_pointer.exp())
        return torch.logaddexp(log_vocab, _log(shares))
    same = ids.unsqueeze(-1) == ids.unsqueeze(-2)  # [..., K, K]
    together = _log_sum(log_pointer.unsqueeze(-2).masked_fill(~same, -torch.inf))  # [..., K]
    is_first = ~(same & _below_diagonal(same)).any(dim=-1)  # [..., K]
    counts = is_first & together.isfinite()
    log_old = log_vocab.gather(-1, ids)
    log_new = torch.logaddexp(log_old, together.masked_fill(~counts, -1e30))
    gain = torch.where(counts, log_new - log_old, 0.0)
    return log_vocab.scatter_add(-1, ids, gain)


def score_targets(mixed: MixedLogits, targets: Tensor) -> Tensor:
    """Return minus ln of the mixture's probability of one token each, [...] for targets [...]."""
    log_vocab = log_softmax(mixed.logits, dim=-1).gather(-1, targets.unsqueeze(-1))
    parts = [
        log_vocab + mixed.log_weights[..., :1],
        mixed.log_weights[..., 1:].masked_fill(
            mixed.token_ids != targets.unsqueeze(-1), -torch.inf
        ),
    ]
    return -torch.logsumexp(torch.cat(parts, dim=-1), dim=-1)


def _below_diagonal(same: Tensor) -> Tensor:
    """Return [K, K] bool, True where the column comes before the row."""
    return torch.ones(same.shape[-2:], dtype=torch.bool, device=same.device).tril(-1)


def _log_sum(scores: Tensor) -> Tensor:
    """Return logsumexp over the last axis, -inf without a gradient of nan where all are -inf."""
    empty = scores.isneginf().all(dim=-1)
    summed = torch.logsumexp(scores.masked_fill(empty.unsqueeze(-1), 0.0), dim=-1)
    return summed.masked_fill(empty, -torch.inf)
