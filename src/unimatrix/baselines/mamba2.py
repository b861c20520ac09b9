"""Mamba-2, from transformers."""

from transformers import Mamba2Config, Mamba2ForCausalLM

from unimatrix.configuration import UniMatrixConfig

_HEAD_DIM = 16
_EXPANSION = 2
_CHUNK_TOKENS = 64


def build_mamba2(
    config: UniMatrixConfig, *, max_tokens: int, inner_size: int | None = None
) -> Mamba2ForCausalLM:
    """Return a Mamba-2 with the width and depth of a UniMatrix.

    It has no feed-forward: its inner width is twice D, in heads of 16, and what ``inner_size`` sets
    is the width of its state.

    Args:
        config: uses V, D (a multiple of 8), L, N and the special tokens.
        max_tokens: unused: it has no positions.
        inner_size: channels of the state of a head, which arXiv:2405.21060 calls N; ``None`` is
            those of a UniMatrix, its N.
    """
    width = config.hidden_size
    return Mamba2ForCausalLM(
        Mamba2Config(
            vocab_size=config.vocab_size,
            hidden_size=width,
            num_hidden_layers=config.num_hidden_layers,
            expand=_EXPANSION,
            head_dim=_HEAD_DIM,
            num_heads=_EXPANSION * width // _HEAD_DIM,
            n_groups=1,
            state_size=config.head_dim if inner_size is None else inner_size,
            chunk_size=_CHUNK_TOKENS,
            tie_word_embeddings=True,
            use_cache=False,
            pad_token_id=config.pad_token_id,
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
        )
    )
