"""Small models of every preset and residual path, with weights far from their start."""

from typing import Any

import torch

from unimatrix.configuration import PRESETS, UniMatrixConfig
from unimatrix.configuration_checks import CHOICES
from unimatrix.modeling import UniMatrixForCausalLM

SMALL: dict[str, Any] = {
    "vocab_size": 23,
    "hidden_size": 12,
    "num_attention_heads": 3,
    "head_dim": 5,
    "slot_key_size": 12,
    "num_slots": 5,
    "max_position_embeddings": None,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# Every preset as published, and core on every residual path; then what only options reach.
VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {} for name in PRESETS},
    "unimatrix": {"automaton_window": 128, "index_head_dim": 4},
    **{f"core+{path}": {"residual_path": path} for path in CHOICES["residual_path"][1:]},
    "discovery+automaton": {"residual_path": "suffix_automaton"},
    "core+automaton-window": {"residual_path": "suffix_automaton", "automaton_window": 24},
    "core+no-matrix": {"update_rules": "none", "residual_path": "previous_token"},
    "core+mixed": {"update_rules": "mixed"},
    "core+conv": {"conv_kernel": 3},
    "assoc+token": {"slot_source": "token"},
    "sparsepointer+hidden": {
        "slot_source": "hidden",
        "identity_lookup": False,
        "identity_values": False,
        "slot_key_size": 7,
    },
    "sparsepointer+two-hops": {
        "slot_hops": 2,
        "product_key_codes": 3,
        "identity_lookup": False,
        "slot_key_size": 6,
    },
    "selective+two-hops": {
        "slot_key_patterns": [[0]],
        "slot_read_offsets": [0, 1],
        "slot_hops": 2,
        "num_slots": 4,
        "bounded_training": False,
    },
    "sparsepointer+automaton": {"residual_path": "suffix_automaton", "write_gate": False},
    "selective+small": {
        "num_slots": 3,
        "slot_read_offsets": [0, 1],
        "slot_fade_tokens": None,
        "bounded_training": False,
        "slot_key_patterns": [[0], [0, 2]],
        "slot_margin": 0.25,
        "automaton_window": 16,
        "update_rules": "delta",
        "conv_kernel": 2,
    },
    "selective+hidden": {
        "slot_source": "hidden",
        "num_slots": 4,
        "slot_key_patterns": [[0, 1]],
        "slot_read_offsets": [0],
        "slot_fade_tokens": 5,
        "update_rules": "delta",
        "repeated_key": "first",
    },
    "selective+no-automaton": {
        "residual_path": "none",
        "automaton_pointer": False,
        "slot_key_patterns": [[0]],
        "update_rules": "delta",
        "conv_kernel": 0,
        "modulation_size": 4,
    },
    "selective+automaton-alone": {"associative_memory": "none", "pointer": False},
    "sparsepointer+table": {"max_position_embeddings": 80},
}


def build_model(
    variant: str, *, dtype: torch.dtype = torch.float64, seed: int = 0, **overrides: Any
) -> UniMatrixForCausalLM:
    """Return a model of a variant in evaluation mode, its weights drawn from ``seed``."""
    config = UniMatrixConfig.preset(
        variant.split("+")[0], **(SMALL | VARIANTS[variant] | overrides)
    )
    model = UniMatrixForCausalLM(config).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            scale = 0.2 if "embed" not in name else 0.5
            offset = 1.0 if name.endswith("norm.weight") else 0.0
            parameter.copy_((offset + scale * noise).to(dtype))
    return model.eval()


def draw_ids(*shape: int, seed: int = 0, low: int = 3, high: int = 12) -> torch.Tensor:
    """Return token ids from a small alphabet, so that matches and evictions happen."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, shape, generator=generator)
