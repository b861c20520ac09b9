"""Which back end each operator of a model runs on: what ``auto`` chose, for the record."""

import torch

from unimatrix.modeling import UniMatrixForCausalLM
from unimatrix.ops import matrix_state, slots


def name_backends(
    model: UniMatrixForCausalLM, num_tokens: int, device: torch.device | str
) -> dict[str, str]:
    """Return the back end of every operator that the model has, keyed as in ``BACKENDS``.

    Args:
        model: any preset.
        num_tokens: T of the forward pass in question.
        device: where it runs.
    """
    place, block = torch.device(device), model.model.block
    context, names = model.model.residual_context, {}
    if (mixer := block.matrix_mixer) is not None:
        auto = matrix_state.choose_backend(num_tokens, place, norm_guard=mixer.norm_guard)
        names["matrix_state"] = auto if mixer.backend == "auto" else mixer.backend
    if block.slot_mixer is not None:
        auto, backend = slots.choose_backend(place, num_tokens), block.slot_mixer.backend
        names["slots"] = auto if backend == "auto" else backend
    if block.dense_mixer is not None:
        backend = block.dense_mixer.backend
        names["dense_memory"] = "parallel" if backend == "auto" else backend
    if context is not None and context.uses_automaton:
        names["suffix_automaton"] = "native" if context.backend == "auto" else context.backend
    return names
