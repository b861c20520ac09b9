"""Mamba-2 as transformers ships it."""

from transformers import Mamba2Config, Mamba2ForCausalLM

from unimatrix.configuration import UniMatrixConfig

_EXPAND = 2


def build_mamba2(
    config: UniMatrixConfig, *, max_tokens: int, intermediate_size: int | None = None
) -> Mamba2ForCausalLM:
    """Return a Mamba-2 with the width, depth and vocabulary of a UniMatrix and heads of its size.

    A head keeps a state of N x N, in one group, inside the usual expansion by two. It has neither a
    feed-forward network nor a longest sequence nor dropout.

    Args:
        config: uses V, D, L, N and the special tokens.
        max_tokens: not used; every peer takes it.
        intermediate_size: not used; every peer takes it.
    """
    return Mamba2ForCausalLM(
        Mamba2Config(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            expand=_EXPAND,
            num_heads=_EXPAND * config.hidden_size // config.head_dim,
            head_dim=config.head_dim,
            state_size=config.head_dim,
            n_groups=1,
            tie_word_embeddings=True,
            pad_token_id=config.pad_token_id,
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
        )
    )
