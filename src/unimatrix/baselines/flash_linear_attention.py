"""Gated linear attention and Gated DeltaNet as flash-linear-attention ships them, for GPUs.

Arguments as in ``peers.BuildPeer``; without ``inner_size``, F is the library's choice.
"""

import importlib
from typing import Any

from unimatrix.baselines.sizes import copy_sizes
from unimatrix.configuration import UniMatrixConfig


def build_gla(config: UniMatrixConfig, *, max_tokens: int, inner_size: int | None = None) -> Any:
    """Return a gated linear attention model with the width, depth and heads of a UniMatrix."""
    models = importlib.import_module("fla.models")
    fields = _copy_fields(config, max_tokens, inner_size)
    return models.GLAForCausalLM(models.GLAConfig(**fields))


def build_gated_deltanet(
    config: UniMatrixConfig, *, max_tokens: int, inner_size: int | None = None
) -> Any:
    """Return a Gated DeltaNet with the width, depth, heads and head size of a UniMatrix."""
    models = importlib.import_module("fla.models")
    fields = _copy_fields(config, max_tokens, inner_size) | {"head_dim": config.head_dim}
    return models.GatedDeltaNetForCausalLM(models.GatedDeltaNetConfig(**fields))


def _copy_fields(
    config: UniMatrixConfig, max_tokens: int, inner_size: int | None
) -> dict[str, Any]:
    return copy_sizes(config) | {
        "num_heads": config.num_attention_heads,
        "intermediate_size": inner_size,
        "max_position_embeddings": max_tokens,
        "tie_word_embeddings": True,
    }
