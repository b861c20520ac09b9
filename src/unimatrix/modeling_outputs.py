"""What the models return."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.modeling_outputs import ModelOutput

from unimatrix.cache import UniMatrixCache
from unimatrix.nn.padding import Padding

POINTER_FIELDS = ("pointer_token_ids", "pointer_weights", "pointer_log_weights")
"""What models return of a ``Pointer``."""


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

    def unpack(self, padding: Padding) -> "Pointer":
        """Return the pointer in the caller's columns; nothing at padding."""
        log_weights = self.log_weights
        if log_weights is not None:
            of_ids = padding.unpack(log_weights[..., 1:])
            of_ids = of_ids.masked_fill(~padding.mask.unsqueeze(-1), -torch.inf)
            log_weights = torch.cat([padding.unpack(log_weights[..., :1]), of_ids], dim=-1)
        token_ids, votes = (None if p is None else padding.unpack(p) for p in self[:2])
        return Pointer(token_ids, votes, log_weights)


@dataclass
class UniMatrixModelOutput(ModelOutput):
    """What ``UniMatrixModel`` returns.

    Attributes:
        last_hidden_state: [B, T, D], normalised stream after the last depth step.
        past_key_values: the cache after these tokens.
        hidden_states: L + 1 tensors [B, T, D]: the stream before each depth step and the
            normalised stream after the last.
        pointer_token_ids: [B, T, K] int64, ids that vote on the logits.
        pointer_weights: [B, T, K], what each adds to its logit.
        pointer_log_weights: [B, T, 1 + K], with a pointer mixture instead: ln of the shares of the
            vocabulary's distribution and of the ids.
        hindsight_scale: zeros that the loss adds, where a gate learns in hindsight.
    """

    last_hidden_state: Tensor | None = None
    past_key_values: UniMatrixCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    pointer_token_ids: Tensor | None = None
    pointer_weights: Tensor | None = None
    pointer_log_weights: Tensor | None = None
    hindsight_scale: tuple[Tensor, Tensor] | None = None

    @property
    def pointer(self) -> Pointer:
        """What retrieved tokens say about the output."""
        return Pointer(*(getattr(self, name) for name in POINTER_FIELDS))


@dataclass
class UniMatrixCausalLMOutput(ModelOutput):
    """What ``UniMatrixForCausalLM`` returns.

    Attributes:
        loss: scalar, mean next-token cross entropy in nats.
        logits: [B, T, V]; ln of the probabilities with a pointer mixture, and ``None`` if only the
            loss was asked for.
        past_key_values: the cache after these tokens.
        hidden_states: as in ``UniMatrixModelOutput``.
        pointer_token_ids: as in ``UniMatrixModelOutput``.
        pointer_weights: as in ``UniMatrixModelOutput``.
        pointer_log_weights: as in ``UniMatrixModelOutput``.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: UniMatrixCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    pointer_token_ids: Tensor | None = None
    pointer_weights: Tensor | None = None
    pointer_log_weights: Tensor | None = None
