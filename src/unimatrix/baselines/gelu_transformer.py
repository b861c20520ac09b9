"""The paper's Transformer: separate layers, learned positions, GELU. It is GPT-2's architecture."""

from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from unimatrix.configuration import UniMatrixConfig


def build_gelu_transformer(
    config: UniMatrixConfig, *, max_tokens: int, inner_size: int | None = None
) -> GPT2LMHeadModel:
    """Return the Transformer that the paper compares with.

    Source: paper, baseline; pre-norm, multi-head attention with biases, exact GELU, final norm,
    tied head: 174,848 parameters at the published size. Its queries, keys and values start as in
    ``torch.nn.MultiheadAttention``, which the published code uses, everything else at a standard
    deviation of 0.02; GPT-2 would start the residual projections lower.

    Args:
        config: uses V, D, L, H, dropout and the special tokens.
        max_tokens: rows of the position table.
        inner_size: F; ``None`` is 4 D.
    """
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocab_size,
            n_embd=config.hidden_size,
            n_layer=config.num_hidden_layers,
            n_head=config.num_attention_heads,
            n_positions=max_tokens,
            n_inner=4 * config.hidden_size if inner_size is None else inner_size,
            activation_function="gelu",
            resid_pdrop=config.dropout,
            embd_pdrop=config.dropout,
            attn_pdrop=config.dropout,
            use_cache=False,
            attn_implementation="sdpa",
            pad_token_id=config.pad_token_id,
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
        )
    )
    for block in model.transformer.h:
        nn.init.xavier_uniform_(block.attn.c_attn.weight)
        for projection in (block.attn.c_proj, block.mlp.c_proj):
            nn.init.normal_(projection.weight, std=config.initializer_range)
    return model
