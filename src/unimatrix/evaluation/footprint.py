"""How large a model is: parameters by part, and the bytes it carries while it reads."""

import torch

from unimatrix.inference.suspend_training import suspend_training
from unimatrix.modeling import UniMatrixForCausalLM

# Beginning of a parameter's name -> the part it belongs to; the first that fits counts.
_PARTS = (
    ("model.embed_tokens.", "token_embedding"),
    ("model.embed_positions.", "position_table"),
    ("model.embed_depth.", "depth_step_embedding"),
    ("model.residual_context.", "residual_context"),
    ("model.block.context_gate.", "residual_context"),
    ("model.token_modulation.", "token_modulation"),
    ("model.block.matrix_mixer.", "matrix_mixer"),
    ("model.block.slot_mixer.", "slot_mixer"),
    ("model.block.dense_mixer.", "dense_mixer"),
    ("model.block.selective_mixer.", "selective_mixer"),
    ("model.pointer_mixture.", "pointer_mixture"),
    ("model.block.feed_forward.", "feed_forward"),
    ("model.block.norm.", "norms"),
    ("model.block.ffn_norm.", "norms"),
    ("model.norm.", "norms"),
    ("lm_head.", "head"),
)


def count_parameters(model: UniMatrixForCausalLM) -> dict[str, int]:
    """Return the parameters of each part that the model has; a tied head counts once.

    Args:
        model: any preset.
    """
    counts = {part: 0 for _, part in _PARTS}
    for name, parameter in model.named_parameters():
        part = next((part for start, part in _PARTS if name.startswith(start)), None)
        assert part is not None, name
        counts[part] += parameter.numel()
    return {part: count for part, count in counts.items() if count}


def measure_state_bytes(model: UniMatrixForCausalLM, *, num_tokens: int = 1) -> dict[str, int]:
    """Return the bytes by part of the cache after some tokens, as allocated, at batch 1.

    Args:
        model: any preset; its mode is restored afterwards.
        num_tokens: tokens read before; it matters only to the parts of ``list_growing_parts``.
    """
    first_id = model.config.bos_token_id or 0
    tokens = torch.full((1, num_tokens), first_id, dtype=torch.int64, device=model.device)
    with suspend_training(model):
        cache = model(input_ids=tokens, use_cache=True).past_key_values
    return {part: count for part, count in cache.bytes_by_part().items() if count}


def list_growing_parts(model: UniMatrixForCausalLM) -> list[str]:
    """Return the parts of the cache that grow with the stream; every other is constant."""
    config, growing = model.config, []
    if config.associative_memory == "dense":
        growing.append("dense_memory")
    if config.residual_path == "suffix_automaton" and config.automaton_window is None:
        growing.append("automaton")
    return growing
