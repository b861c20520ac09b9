"""A Transformer of the same width and depth: Llama with scaled dot product attention."""

from transformers import LlamaConfig, LlamaForCausalLM

from unimatrix.configuration import UniMatrixConfig


def build_llama(
    config: UniMatrixConfig, *, max_tokens: int, inner_size: int | None = None
) -> LlamaForCausalLM:
    """Return a Llama with the width, depth, heads and vocabulary of a UniMatrix.

    Its gated feed-forward has three matrices, so 8 D / 3 makes it as large as ours of 4 D. It has
    no dropout.

    Args:
        config: uses V, D, L, H and the special tokens.
        max_tokens: the longest sequence it will see.
        inner_size: F; ``None`` is 8 D / 3.
    """
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=round(8 * config.hidden_size / 3)
            if inner_size is None
            else inner_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_attention_heads,
            max_position_embeddings=max_tokens,
            tie_word_embeddings=True,
            use_cache=False,
            attn_implementation="sdpa",
            pad_token_id=config.pad_token_id,
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
        )
    )
