"""Reading the authors' parameter names and configurations.

Source: xiaol/Autoresearch_ideas at commit e7f6624, ``model/unimatrix.py``.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from unimatrix.configuration import UniMatrixConfig
from unimatrix.errors import InputError, suggest
from unimatrix.modeling import UniMatrixForCausalLM

# Published parameter (without ".weight" or ".bias") -> ours.
PARAMETER_NAMES = {
    "token_embed": "model.embed_tokens",
    "pos_embed": "model.embed_positions",
    "step_embed": "model.embed_depth",
    "final_norm": "model.norm",
    "lm_head": "lm_head",
    "rosa.embed": "model.residual_context.embed",
    "deep.deep": "model.token_modulation.embed",
    "deep.proj": "model.token_modulation.proj",
    "block.norm": "model.block.norm",
    "block.ffn_norm": "model.block.ffn_norm",
    "block.q_proj": "model.block.matrix_mixer.q_proj",
    "block.k_proj": "model.block.matrix_mixer.k_proj",
    "block.v_proj": "model.block.matrix_mixer.v_proj",
    "block.diag_proj": "model.block.matrix_mixer.diag_proj",
    "block.rule_proj": "model.block.matrix_mixer.rule_proj",
    "block.retention_proj": "model.block.matrix_mixer.retention_proj",
    "block.output_proj": "model.block.matrix_mixer.out_proj",
    "block.residual_gate": "model.block.matrix_mixer.residual_gate",
    "block.rosa_gate": "model.block.context_gate",
    "block.assoc_query_proj": "model.block.{mixer}.query_proj",
    "block.assoc_key_proj": "model.block.{mixer}.key_proj",
    "block.assoc_val_proj": "model.block.{mixer}.value_proj",
    "block.assoc_gate": "model.block.{mixer}.read_gate",
    "block.pointer_write_gate_proj": "model.block.slot_mixer.write_gate",
    "block.pointer_logit_gate_proj": "model.block.slot_mixer.pointer_gate",
    "block.ffn.0": "model.block.feed_forward.up_proj",
    "block.ffn.3": "model.block.feed_forward.down_proj",
}

# Published configuration fields that carry over unchanged under our name.
_CONFIG_NAMES = {
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "state_dim": "head_dim",
    "dropout": "dropout",
    "max_seq_len": "max_position_embeddings",
    "pad_token_id": "pad_token_id",
    "tie_embeddings": "tie_word_embeddings",
    "use_spectral_norm": "norm_guard",
    "use_step_embedding": "depth_step_embedding",
    "assoc_dim": "slot_key_size",
    "assoc_topk": "slots_per_read",
    "assoc_slots": "num_slots",
    "assoc_use_identity_lookup": "identity_lookup",
    "assoc_use_identity_values": "identity_values",
    "pointer_merge_threshold": "match_threshold",
    "pointer_strength_floor": "strength_floor",
    "use_pointer_write_gate": "write_gate",
}
_HANDLED_NAMES = {
    "mlp_ratio",
    "deep_embed_dim",
    "use_rosa",
    "use_deepembed",
    "use_rule_mix",
    "use_assoc_memory",
    "assoc_use_token_source",
    "use_sparse_pointer",
    "use_pointer_logits",
    "variant_name",
}


def convert_config(config: Mapping[str, Any]) -> UniMatrixConfig:
    """Return our configuration for the authors' fields; fields left out take our defaults.

    Raises:
        InputError: for a field that is not published, with the nearest one that is.
    """
    known = _CONFIG_NAMES.keys() | _HANDLED_NAMES
    for name in config:
        if name not in known:
            raise InputError(
                f"unknown published configuration field {name!r}.{suggest(name, known)}"
            )
    fields = {ours: config[name] for name, ours in _CONFIG_NAMES.items() if name in config}
    uses_slots = bool(config.get("use_sparse_pointer"))
    uses_dense = bool(config.get("use_assoc_memory")) and not uses_slots
    if not (uses_slots or uses_dense):
        # The published code ignores these fields without a memory; ours would reject them.
        for name in ("slot_key_size", "identity_lookup", "identity_values"):
            fields.pop(name, None)
    vocab_size = fields.get("vocab_size", UniMatrixConfig().vocab_size)
    if vocab_size != UniMatrixConfig().vocab_size:
        fields |= {"bos_token_id": None, "eos_token_id": None}
    width = config.get("d_model", UniMatrixConfig().hidden_size)
    return UniMatrixConfig(
        **fields,
        intermediate_size=int(width * config.get("mlp_ratio", 4)),
        residual_path="previous_token" if config.get("use_rosa") else "none",
        modulation_size=config.get("deep_embed_dim", 32) if config.get("use_deepembed") else 0,
        update_rules="mixed" if config.get("use_rule_mix") else "outer",
        associative_memory="slots" if uses_slots else "dense" if uses_dense else "none",
        slot_source="token" if config.get("assoc_use_token_source") else "hidden",
        pointer=uses_slots and bool(config.get("use_pointer_logits", True)),
    )


def convert_name(name: str, config: UniMatrixConfig) -> str:
    """Return our name of a published parameter, such as ``block.q_proj.weight``.

    Raises:
        InputError: for a name that is not published.
    """
    module, _, kind = name.rpartition(".")
    if module not in PARAMETER_NAMES:
        raise InputError(f"unknown published parameter {name!r}.{suggest(module, PARAMETER_NAMES)}")
    mixer = "slot_mixer" if config.associative_memory == "slots" else "dense_mixer"
    return f"{PARAMETER_NAMES[module].format(mixer=mixer)}.{kind}"


def from_published(config: Mapping[str, Any], params: Mapping[str, Tensor]) -> UniMatrixForCausalLM:
    """Build our model, in evaluation mode, from the authors' configuration and parameters.

    Args:
        config: published field names, as in ``convert_config``.
        params: published parameter names to tensors, float32 or float64; the tied head is absent.

    Raises:
        InputError: for unknown fields or names, and for missing or misshapen parameters.
    """
    ours = convert_config(config)
    model = UniMatrixForCausalLM(ours)
    model.to(next(iter(params.values())).dtype)
    expected = {
        name: parameter.shape
        for name, parameter in model.named_parameters()
        if not (name == "lm_head.weight" and ours.tie_word_embeddings)
    }
    converted = {convert_name(name, ours): tensor for name, tensor in params.items()}
    missing = expected.keys() - converted.keys()
    surplus = converted.keys() - expected.keys()
    if missing or surplus:
        raise InputError(
            f"the parameters do not fit the configuration: missing {sorted(missing)}, "
            f"not used {sorted(surplus)}"
        )
    for name, tensor in converted.items():
        if tensor.shape != expected[name]:
            raise InputError(
                f"parameter {name} has shape {list(tensor.shape)}; the configuration needs "
                f"{list(expected[name])}"
            )
    model.load_state_dict(converted, strict=False)
    model.tie_weights()
    model.eval()
    return model
