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
    """

    last_hidden_state: Tensor | None = None
    past_key_values: UniMatrixCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    pointer_token_ids: Tensor | None = None
    pointer_weights: Tensor | None = None


@dataclass
class UniMatrixCausalLMOutput(ModelOutput):
    """What ``UniMatrixForCausalLM`` returns.

    Attributes:
        loss: scalar, mean next-token cross entropy in nats.
        logits: [B, T, V].
        past_key_values: the cache after these tokens.
        hidden_states: as in ``UniMatrixModelOutput``.
        pointer_token_ids: as in ``UniMatrixModelOutput``.
        pointer_weights: as in ``UniMatrixModelOutput``.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: UniMatrixCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    pointer_token_ids: Tensor | None = None
    pointer_weights: Tensor | None = None
