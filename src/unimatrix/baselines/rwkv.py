"""RWKV-4, from transformers."""

from transformers import RwkvConfig, RwkvForCausalLM

from unimatrix.configuration import UniMatrixConfig


def build_rwkv(
    config: UniMatrixConfig, *, max_tokens: int, inner_size: int | None = None
) -> RwkvForCausalLM:
    """Return an RWKV-4 with the width and depth of a UniMatrix.

    Its head is not tied to its embedding, as the library has it. Without a CUDA kernel transformers
    scans it token by token, in training too.

    Args:
        config: uses V, D, L (at least 2, its initial values ask for that) and the special tokens.
        max_tokens: what the CUDA kernel is built for; the model itself has no positions.
        inner_size: F; ``None`` is 4 D.
    """
    return RwkvForCausalLM(
        RwkvConfig(
            vocab_size=config.vocab_size,
            context_length=max_tokens,
            hidden_size=config.hidden_size,
            attention_hidden_size=config.hidden_size,
            intermediate_size=4 * config.hidden_size if inner_size is None else inner_size,
            num_hidden_layers=config.num_hidden_layers,
            # Halving activations is for half precision at many layers.
            rescale_every=0,
            use_cache=False,
            pad_token_id=config.pad_token_id,
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
        )
    )
