"""What the models return."""

from dataclasses import dataclass

from torch import Tensor
from transformers.modeling_outputs import ModelOutput

from unimatrix.cache import UniMatrixCache


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
        document_starts: [B, T] bool, the first token of each document, where rows hold several.
    """

    last_hidden_state: Tensor | None = None
    past_key_values: UniMatrixCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    pointer_token_ids: Tensor | None = None
    pointer_weights: Tensor | None = None
    pointer_log_weights: Tensor | None = None
    hindsight_scale: tuple[Tensor, Tensor] | None = None
    document_starts: Tensor | None = None


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
        pointer_log_weights: as in ``UniMatrixModelOutput``; these three are ``None`` if only the
            loss was asked for.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: UniMatrixCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    pointer_token_ids: Tensor | None = None
    pointer_weights: Tensor | None = None
    pointer_log_weights: Tensor | None = None
