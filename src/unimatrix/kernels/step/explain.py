"""Why the compiled decode step cannot stand for a model: it runs what is named here alone."""

from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from transformers import PreTrainedModel

from unimatrix.configuration import UniMatrixConfig, get_config_defaults
from unimatrix.kernels.explain import explain_module
from unimatrix.nn.associative_projections import AssociativeProjections
from unimatrix.nn.block import UniMatrixBlock
from unimatrix.nn.feed_forward import FeedForward, GatedFeedForward
from unimatrix.nn.indexed_attention import IndexedAttention
from unimatrix.nn.matrix_mixer import MatrixMixer, RetentionProjection
from unimatrix.nn.mixer import Mixer
from unimatrix.nn.pointer_mixture import PointerMixture
from unimatrix.nn.residual_context import ResidualContext
from unimatrix.nn.selective_mixer import SelectiveMixer
from unimatrix.nn.short_convolution import ShortConvolution
from unimatrix.nn.slot_mixer import SlotMixer
from unimatrix.nn.token_modulation import TokenModulation
from unimatrix.ops.backends import compiles_native

# Fields that the step knows with any value: sizes, numbers, and what matters in training alone.
_ANY_VALUE = frozenset(
    """
    vocab_size hidden_size num_hidden_layers num_attention_heads head_dim conv_kernel
    intermediate_size dropout max_position_embeddings norm_guard normalized_keys
    longest_retention depth_step_embedding modulation_size slot_key_size num_slots
    slots_per_read identity_lookup identity_values match_threshold strength_floor write_gate
    pointer slot_key_patterns slot_read_offsets bounded_training slot_margin slot_fade_tokens
    hindsight hindsight_share hindsight_floor hindsight_weight automaton_window
    automaton_pointer index_units index_heads index_head_dim index_reads_at
    index_boundaries initializer_range layer_norm_eps use_cache pad_token_id bos_token_id
    eos_token_id tie_word_embeddings format_version
    """.split()  # noqa: SIM905
)
# Field -> the values that the step knows; a field in neither list must have its default.
_KNOWN: dict[str, tuple[Any, ...]] = {
    "norm_type": ("layer_norm", "rms_norm"),
    "feed_forward_type": ("gelu", "swiglu"),
    "residual_path": ("none", "previous_token", "suffix_automaton"),
    "update_rules": ("outer", "mixed", "delta", "none"),
    "associative_memory": ("none", "slots", "selective", "indexed"),
    "slot_source": ("token", "hidden"),
    "repeated_key": ("last", "first"),
}
_MODULES = (
    nn.Linear,
    nn.Embedding,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.Dropout,
    nn.Identity,
    nn.ModuleList,
    AssociativeProjections,
    FeedForward,
    GatedFeedForward,
    IndexedAttention,
    MatrixMixer,
    PointerMixture,
    ResidualContext,
    RetentionProjection,
    SelectiveMixer,
    ShortConvolution,
    SlotMixer,
    TokenModulation,
    UniMatrixBlock,
)


# Parameters with a row a token.
_TABLES = (
    "model.embed_tokens.weight",
    "model.residual_context.embed.weight",
    "model.token_modulation.embed.weight",
    "lm_head.weight",
)


def explain_config(config: UniMatrixConfig) -> str | None:
    """Return why no compiled step exists for a configuration, ``None`` if one does.

    The list is one of what is allowed: a field that is not on it must have its default. Not on it
    is the dense associative memory, which grows with the stream.
    """
    for name, default in get_config_defaults().items():
        value = getattr(config, name)
        if name not in _ANY_VALUE and value not in _KNOWN.get(name, (default,)):
            return f"{name} is {value!r}"
    return None


def explain_step(model: PreTrainedModel) -> str | None:
    """Return why the compiled step cannot stand for a model as it is, ``None`` if it can.

    Beside the configuration: it runs on the CPU in float32 and float64, in evaluation mode, with
    the modules as they were built (an adapter or a quantised layer is another module, and a hook
    expects to be called), and with back ends left to ``auto``.

    Args:
        model: a ``UniMatrixForCausalLM``.
    """
    reason = explain_config(model.config)
    if reason is not None:
        return reason
    if model.training:
        return "the model is in training mode"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    if _has_any_global_hook():  # type: ignore[no-untyped-call]
        return "a hook on every module is set"
    for name, module in model.named_modules():
        own = type(module).__module__ == "unimatrix.modeling"
        if type(module) not in _MODULES and not own:
            return f"{name or 'the model'} is a {type(module).__name__}"
        reason = explain_module(name or "the model", module)
        if reason is not None:
            return reason
        options = module.operator_options if isinstance(module, Mixer) else {}
        if options and set(options) == {"backend"}:
            return f"the back end of {name} is {options['backend']!r}"
        if options:
            return f"the operator of {name} has options: {options}"
    backend = model.base_model.passes_backend
    if backend != "auto":
        return f"the back end of fused_passes is {backend!r}"
    reason = _explain_tables(model) or _explain_forms(model)
    if reason is not None:
        return reason
    for name, weight in model.named_parameters():
        if type(weight) not in (torch.Tensor, nn.Parameter):  # Quantised or sharded.
            return f"{name} is a {type(weight).__name__}"
    kinds = {(p.device.type, p.dtype) for p in model.parameters()}
    if len(kinds) > 1:
        return "its parameters differ in device or type"
    ((device, dtype),) = kinds
    if device != "cpu" or dtype not in (torch.float32, torch.float64):
        return f"its parameters are {str(dtype).removeprefix('torch.')} on {device}"
    if not compiles_native():
        return "compiled kernels failed their check in this process"
    return None


def _explain_forms(model: PreTrainedModel) -> str | None:
    """Return which parameter is not as the model was built with it; tables may be resized."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = 1 if name in _TABLES else 0
        built = model.built_shapes.get(name)
        if built is None or parameter.shape[first:] != built[first:]:
            return f"{name} is not as the model was built"
    missing = model.built_shapes.keys() - dict(model.named_parameters(remove_duplicate=False))
    if missing:
        return f"{min(missing)} is missing"
    for name, module in model.named_modules():
        is_norm = isinstance(module, nn.LayerNorm | nn.RMSNorm)
        if is_norm and module.eps != model.config.layer_norm_eps:
            return f"the eps of {name} is {module.eps}"
    return None


def _explain_tables(model: PreTrainedModel) -> str | None:
    """Return which table that is indexed by token has another size than the vocabulary."""
    inner, vocab = model.model, model.config.vocab_size
    tables = {
        "embed_tokens": inner.embed_tokens,
        "residual_context": getattr(inner.residual_context, "embed", None),
        "token_modulation": getattr(inner.token_modulation, "embed", None),
        "lm_head": model.lm_head,
    }
    for name, table in tables.items():
        if table is not None and table.weight.shape[0] != vocab:
            return f"{name} has {table.weight.shape[0]} rows and the vocabulary {vocab} tokens"
    return None
