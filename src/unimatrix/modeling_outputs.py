"""What the models return, and how several passes over rows become one output."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor
from transformers.modeling_outputs import ModelOutput

from unimatrix.cache import UniMatrixCache
from unimatrix.nn.packing import Packing, join_rows
from unimatrix.nn.padding import Padding
from unimatrix.nn.pointer_mixture import Pointer
from unimatrix.ops.hindsight import HindsightScale


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

    @property
    def pointer(self) -> Pointer:
        """What retrieved tokens say about the output."""
        return Pointer(self.pointer_token_ids, self.pointer_weights, self.pointer_log_weights)


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

    @classmethod
    def of_model(
        cls, output: UniMatrixModelOutput, loss: Tensor | None, logits: Tensor | None
    ) -> "UniMatrixCausalLMOutput":
        """Return loss and logits with what goes on from the model's output to the caller."""
        pointer = Pointer() if logits is None else output.pointer
        return cls(loss, logits, output.past_key_values, output.hidden_states, *pointer)


class Passed(NamedTuple):
    """What one pass of the layers makes of rows.

    Attributes:
        last: [n, t, D], the normalised stream after the last depth step.
        hidden_states: the stream before each depth step, in the caller's columns.
        pointer: of [n, t] positions.
        scales: by the mixer's name, zeros that the loss adds where a gate learns in hindsight.
        cache: the cache after these rows.
    """

    last: Tensor
    hidden_states: list[Tensor]
    pointer: Pointer
    scales: dict[str, HindsightScale]
    cache: UniMatrixCache | None


def collect_scales(reads: Mapping[str, Any]) -> dict[str, HindsightScale]:
    """Return the auxiliary losses that mixers hand upwards, of what they read, by their names."""
    scales = {name: getattr(read, "scale", None) for name, read in reads.items()}
    return {name: scale for name, scale in scales.items() if scale is not None}


def join_passes(passes: list[Passed], rows: Padding | Packing | None) -> UniMatrixModelOutput:
    """Return what passes over groups of rows made, in the caller's columns.

    Args:
        passes: one, or those of several groups of documents.
        rows: how rows were rearranged; ``None`` is not at all.
    """
    last, _, pointer, _, cache = passes[0]
    if len(passes) > 1:  # as one row, [1, n t + ..., *]
        last, cache = join_rows([part.last for part in passes]), None
        fields = zip(*(part.pointer for part in passes), strict=True)
        pointer = Pointer(*(None if field[0] is None else join_rows(field) for field in fields))
    if rows is not None:
        last, pointer = rows.unpack(last), pointer.unpack(rows)
    return UniMatrixModelOutput(
        last_hidden_state=last,
        past_key_values=cache,
        pointer_token_ids=pointer.token_ids,
        pointer_weights=pointer.votes,
        pointer_log_weights=pointer.log_weights,
        hindsight_scale=_sum_scales(passes),
        document_starts=rows.starts if isinstance(rows, Packing) else None,
    )


def _sum_scales(passes: list[Passed]) -> tuple[Tensor, Tensor] | None:
    """Return the zeros of all mixers added; those of one mixer are a mean over all passes."""
    joined = [
        HindsightScale.join([part.scales[name] for part in passes]) for name in passes[0].scales
    ]
    if not joined:
        return None
    of_target, of_gate = joined[0]
    for target, gate in joined[1:]:
        of_target, of_gate = of_target + target, of_gate + gate
    return of_target, of_gate
