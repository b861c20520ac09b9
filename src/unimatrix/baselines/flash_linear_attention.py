"""Gated linear attention and Gated DeltaNet as flash-linear-attention ships them, for GPUs."""

import importlib
from typing import Any

from unimatrix.configuration import UniMatrixConfig


def build_gla(config: UniMatrixConfig, *, max_tokens: int, inner_size: int | None = None) -> Any:
    """Return a gated linear attention model with the width, depth and heads of a UniMatrix.

    Args:
        config: uses V, D, L, H and the special tokens.
        max_tokens: the longest sequence it will see.
        inner_size: F; ``None`` is the library's choice.
    """
    models = importlib.import_module("fla.models")
    return models.GLAForCausalLM(
        models.GLAConfig(
            num_heads=config.num_attention_heads,
            **_share_fields(config, max_tokens, inner_size),
        )
    )


def build_gated_deltanet(
    config: UniMatrixConfig, *, max_tokens: int, inner_size: int | None = None
) -> Any:
    """Return a Gated DeltaNet with the width, depth, heads and head size of a UniMatrix.

    Args:
        config: uses V, D, L, H, N and the special tokens.
        max_tokens: the longest sequence it will see.
        inner_size: F; ``None`` is the library's choice.
    """
    models = importlib.import_module("fla.models")
    return models.GatedDeltaNetForCausalLM(
        models.GatedDeltaNetConfig(
            num_heads=config.num_attention_heads,
            head_dim=config.head_dim,
            **_share_fields(config, max_tokens, inner_size),
        )
    )


def _share_fields(
    config: UniMatrixConfig, max_tokens: int, inner_size: int | None
) -> dict[str, Any]:
    """Return the fields that the library's configurations have in common."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "intermediate_size": inner_size,
        "max_position_embeddings": max_tokens,
        "tie_word_embeddings": True,
        "pad_token_id": config.pad_token_id,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
    }
