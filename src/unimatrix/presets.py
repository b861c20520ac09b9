"""The presets, as differences from the defaults of ``UniMatrixConfig``."""

from typing import Any

_ROSA: dict[str, Any] = {"residual_path": "previous_token"}
_DISCOVERY: dict[str, Any] = {
    "residual_path": "previous_token",
    "modulation_size": 32,
    "update_rules": "mixed",
    "norm_guard": True,
    "depth_step_embedding": True,
}
_ASSOC: dict[str, Any] = {
    "associative_memory": "dense",
    "slot_source": "hidden",
    "slot_key_size": 64,
    "slots_per_read": 8,
}
_HARD: dict[str, Any] = {"slots_per_read": 1}
_TEXT: dict[str, Any] = {
    "max_position_embeddings": None,
    "norm_type": "rms_norm",
    "feed_forward_type": "swiglu",
    "intermediate_size": 171,
    "update_rules": "mixed",
    "conv_kernel": 4,
    "normalized_keys": True,
    "longest_retention": 512,
    "residual_path": "suffix_automaton",
    "automaton_window": 16_384,
    "automaton_pointer": True,
    "pointer": True,
}
PRESETS: dict[str, dict[str, Any]] = {
    "core": {},
    "rosa": _ROSA,
    "discovery": _DISCOVERY,
    "assoc": _ASSOC,
    "assoc-hard": _ASSOC | _HARD,
    "rosa-assoc": _ROSA | _ASSOC,
    "rosa-assoc-hard": _ROSA | _ASSOC | _HARD,
    "discovery-assoc": _DISCOVERY | _ASSOC,
    "sparsepointer": {
        "associative_memory": "slots",
        "slot_source": "token",
        "identity_lookup": True,
        "identity_values": True,
        "pointer": True,
    },
    # Slots that learn in hindsight what to keep, in the place of the indexed attention.
    "selective": _TEXT
    | {
        "associative_memory": "selective",
        "slot_source": "token",
        "num_slots": 64,
        # Text needs long contexts, and slots that do not freeze.
        "slot_key_patterns": [[0, 1, 2, 3, 4, 5, 6, 7]],
        "slot_read_offsets": [0],
        "slot_fade_tokens": 32,
        "bounded_training": True,
    },
    # Every part on.
    "unimatrix": _TEXT
    | {"associative_memory": "indexed", "index_boundaries": True, "modulation_size": 32},
}
