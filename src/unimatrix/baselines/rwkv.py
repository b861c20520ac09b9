"""RWKV-4 as transformers ships it."""

from transformers import RwkvConfig, RwkvForCausalLM

from unimatrix.configuration import UniMatrixConfig


def build_rwkv(
    config: UniMatrixConfig, *, max_tokens: int, intermediate_size: int | None = None
) -> RwkvForCausalLM:
    """Return an RWKV-4 with the width, depth and vocabulary of a UniMatrix.

    Its head is not tied to its embedding, as the library has it; it has no dropout.

    Args:
        config: uses V, D, L and the special tokens.
        max_tokens: the longest sequence it will see in one pass.
        intermediate_size: F; ``None`` is 4 D.
    """
    return RwkvForCausalLM(
        RwkvConfig(
            vocab_size=config.vocab_size,
            context_length=max_tokens,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            intermediate_size=intermediate_size,
            pad_token_id=config.pad_token_id,
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
        )
    )
