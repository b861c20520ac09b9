"""Gated linear attention and Gated DeltaNet; arguments as in ``peers.BuildPeer``.

They have no positions, so ``max_tokens`` sets nothing. The usual F is 8 D / 3.
"""

from typing import Any

from unimatrix.baselines.linear_attention.modeling import (
    LinearAttentionConfig,
    LinearAttentionForCausalLM,
)
from unimatrix.baselines.sizes import copy_sizes
from unimatrix.configuration import UniMatrixConfig


def build_gated_linear_attention(
    config: UniMatrixConfig, *, max_tokens: int, inner_size: int | None = None
) -> LinearAttentionForCausalLM:
    """Return a gated linear attention with the width, depth and heads of a UniMatrix.

    Source: arXiv:2312.06635; keys half as wide as the stream, values as wide, as in
    flash-linear-attention.
    """
    head_dim = config.hidden_size // config.num_attention_heads
    return _build(
        config, inner_size, rule="gated", key_head_dim=head_dim // 2, value_head_dim=head_dim
    )


def build_gated_deltanet(
    config: UniMatrixConfig, *, max_tokens: int, inner_size: int | None = None
) -> LinearAttentionForCausalLM:
    """Return a Gated DeltaNet with the width, depth and heads of a UniMatrix.

    Source: arXiv:2412.06464; keys 3/4 and values 3/2 as wide as the stream, a convolution of 4
    tokens, as in flash-linear-attention.
    """
    key_head_dim = max(1, 3 * config.hidden_size // (4 * config.num_attention_heads))
    return _build(
        config,
        inner_size,
        rule="gated_delta",
        key_head_dim=key_head_dim,
        value_head_dim=2 * key_head_dim,
        conv_size=4,
    )


def _build(
    config: UniMatrixConfig, inner_size: int | None, **fields: Any
) -> LinearAttentionForCausalLM:
    usual_size = round(8 * config.hidden_size / 3)
    return LinearAttentionForCausalLM(
        LinearAttentionConfig(
            **copy_sizes(config),
            intermediate_size=usual_size if inner_size is None else inner_size,
            num_attention_heads=config.num_attention_heads,
            **fields,
        )
    )
