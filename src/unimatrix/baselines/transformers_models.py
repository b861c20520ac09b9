"""Models of transformers with the sizes of a UniMatrix; arguments as in ``peers.BuildPeer``."""

from typing import Any

from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)

from unimatrix.baselines.sizes import copy_sizes, copy_special_ids
from unimatrix.configuration import UniMatrixConfig

_MAMBA2_HEAD_DIM = 16
_MAMBA2_EXPANSION = 2
_MAMBA2_CHUNK_TOKENS = 64


def build_llama(
    config: UniMatrixConfig, *, max_tokens: int, inner_size: int | None = None
) -> LlamaForCausalLM:
    """Return a Llama with scaled dot product attention and without dropout.

    Its gated feed-forward has three matrices: at the usual F of 8 D / 3 they have as many
    parameters as the two of ours at 4 D.
    """
    return LlamaForCausalLM(
        LlamaConfig(
            **copy_sizes(config),
            intermediate_size=round(8 * config.hidden_size / 3)
            if inner_size is None
            else inner_size,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_attention_heads,
            max_position_embeddings=max_tokens,
            tie_word_embeddings=True,
            use_cache=False,
            attn_implementation="sdpa",
        )
    )


class RepeatedLayer(nn.Module):
    """Apply one layer several times; it keeps no cache, where a layer has one place only.

    Args:
        layer: a decoder layer of Llama.
        num_times: L, depth steps.
    """

    def __init__(self, layer: nn.Module, num_times: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_times = num_times

    def forward(
        self, hidden_states: Tensor, *, past_key_values: Any = None, **options: Any
    ) -> Tensor:
        """Return the stream [B, T, D] after all depth steps."""
        if past_key_values is not None:
            raise ValueError("a Universal Transformer keeps no cache here; pass use_cache=False")
        for _ in range(self.num_times):
            hidden_states = self.layer(hidden_states, **options)
        return hidden_states


def build_universal_transformer(
    config: UniMatrixConfig, *, max_tokens: int, inner_size: int | None = None
) -> LlamaForCausalLM:
    """Return a plain Universal Transformer: one layer of Llama, applied at every depth step.

    Source: arXiv:1807.03819, without adaptive halting; rotary positions instead of its sinusoids,
    as in the Llama beside it.
    """
    one_layer = type(config)(**(config.to_diff_dict() | {"num_hidden_layers": 1}))
    model = build_llama(one_layer, max_tokens=max_tokens, inner_size=inner_size)
    model.model.layers[0] = RepeatedLayer(model.model.layers[0], config.num_hidden_layers)
    return model


def build_gelu_transformer(
    config: UniMatrixConfig, *, max_tokens: int, inner_size: int | None = None
) -> GPT2LMHeadModel:
    """Return the Transformer that the paper compares with, whose architecture is that of GPT-2.

    Source: paper, baseline: pre-norm, learned positions, multi-head attention with biases, exact
    GELU, final norm, tied head: 174,848 parameters at the published size, F is 4 D. Its queries,
    keys and values start as in ``torch.nn.MultiheadAttention``, which the published code uses,
    everything else at a standard deviation of 0.02; GPT-2 would start the residual projections
    lower.
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
            **copy_special_ids(config),
        )
    )
    for block in model.transformer.h:
        nn.init.xavier_uniform_(block.attn.c_attn.weight)
        for projection in (block.attn.c_proj, block.mlp.c_proj):
            nn.init.normal_(projection.weight, std=config.initializer_range)
    return model


def build_mamba2(
    config: UniMatrixConfig, *, max_tokens: int, inner_size: int | None = None
) -> Mamba2ForCausalLM:
    """Return a Mamba-2, whose D is a multiple of 8.

    It has no positions and no feed-forward: its inner width is twice D, in heads of 16, and
    ``inner_size`` sets the channels of a head's state, which arXiv:2405.21060 calls N; without it,
    N of the UniMatrix.
    """
    width = config.hidden_size
    return Mamba2ForCausalLM(
        Mamba2Config(
            **copy_sizes(config),
            expand=_MAMBA2_EXPANSION,
            head_dim=_MAMBA2_HEAD_DIM,
            num_heads=_MAMBA2_EXPANSION * width // _MAMBA2_HEAD_DIM,
            n_groups=1,
            state_size=config.head_dim if inner_size is None else inner_size,
            chunk_size=_MAMBA2_CHUNK_TOKENS,
            tie_word_embeddings=True,
            use_cache=False,
        )
    )


def build_rwkv(
    config: UniMatrixConfig, *, max_tokens: int, inner_size: int | None = None
) -> RwkvForCausalLM:
    """Return an RWKV-4 of at least two layers, which its initial values need; its F is 4 D.

    Its head is not tied to its embedding, as the library has it. Without a CUDA kernel, which is
    built for ``max_tokens``, transformers scans it token by token, in training too.
    """
    return RwkvForCausalLM(
        RwkvConfig(
            **copy_sizes(config),
            context_length=max_tokens,
            attention_hidden_size=config.hidden_size,
            intermediate_size=4 * config.hidden_size if inner_size is None else inner_size,
            # Halving activations is for half precision at many layers.
            rescale_every=0,
            use_cache=False,
        )
    )
