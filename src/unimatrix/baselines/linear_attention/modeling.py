"""A causal language model of gated linear attention or Gated DeltaNet layers.

The layers are those of flash-linear-attention at their defaults, but for widths: RMSNorm, mixer,
RMSNorm, gated feed-forward; no positions, for the mixer's retention tells them.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, normalize, pad, silu, softplus
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast

from unimatrix.baselines.linear_attention.chunked import chunk_gated, chunk_gated_delta
from unimatrix.errors import require_choice

RULES = ("gated", "gated_delta")
_RETENTION_RANK = 16
_RETENTION_TEMPERATURE = 16
_NORM_EPS = 1e-5


class LinearAttentionConfig(PreTrainedConfig):
    """Describe the model.

    Fields that transformers has too are as in ``UniMatrixConfig``, and layers are separate.

    Args:
        rule: ``gated`` (gated linear attention) or ``gated_delta`` (Gated DeltaNet).
        key_head_dim, value_head_dim: K and P of a head.
        conv_size: tokens under the short convolution of q, k and v; 0 is none.
    """

    model_type = "linear_attention_peer"

    def __init__(
        self,
        *,
        vocab_size: int = 259,
        hidden_size: int = 64,
        intermediate_size: int = 171,
        num_hidden_layers: int = 3,
        num_attention_heads: int = 4,
        rule: str = "gated",
        key_head_dim: int = 8,
        value_head_dim: int = 16,
        conv_size: int = 0,
        initializer_range: float = 0.02,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ) -> None:
        require_choice("rule is", rule, RULES)
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.rule = rule
        self.key_head_dim = key_head_dim
        self.value_head_dim = value_head_dim
        self.conv_size = conv_size
        self.initializer_range = initializer_range
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
        self.tie_word_embeddings = tie_word_embeddings


@dataclass(frozen=True)
class LayerCarry:
    """What a layer needs to continue a sequence.

    Attributes:
        state: [B, H, K, P].
        conv_tail: [B, conv_size - 1, H (2 K + P)], the last inputs of the convolution; ``None``
            without one.
    """

    state: Tensor
    conv_tail: Tensor | None


LinearAttentionCache = tuple[LayerCarry, ...]
"""What every layer carries, the first layer's first; ``forward`` alters none."""


class LinearAttentionMixer(nn.Module):
    """Mix tokens through a matrix state of constant size."""

    def __init__(self, config: LinearAttentionConfig) -> None:
        super().__init__()
        self.config = config
        width, num_heads = config.hidden_size, config.num_attention_heads
        self.sizes = [config.key_head_dim, config.key_head_dim, config.value_head_dim]
        num_channels = num_heads * sum(self.sizes)
        self.qkv_proj = nn.Linear(width, num_channels, bias=False)
        self.conv = None
        if config.conv_size:
            self.conv = nn.Conv1d(
                num_channels, num_channels, config.conv_size, groups=num_channels, bias=False
            )
        self.output_gate = nn.Linear(width, num_heads * config.value_head_dim, bias=False)
        self.output_norm = nn.RMSNorm(config.value_head_dim, eps=_NORM_EPS)
        self.out_proj = nn.Linear(num_heads * config.value_head_dim, width, bias=False)
        if config.rule == "gated":
            self.retention_proj: nn.Module = nn.Sequential(
                nn.Linear(width, _RETENTION_RANK, bias=False),
                nn.Linear(_RETENTION_RANK, num_heads * config.key_head_dim),
            )
        else:
            self.retention_proj = nn.Linear(width, num_heads, bias=False)
            self.beta_proj = nn.Linear(width, num_heads, bias=False)
            self.log_rate = nn.Parameter(torch.empty(num_heads))
            self.rate_bias = nn.Parameter(torch.empty(num_heads))

    def forward(self, h: Tensor, carry: LayerCarry | None) -> tuple[Tensor, LayerCarry]:
        """Return the mixed stream [B, T, D] and what the next tokens need.

        ``h`` is [B, T, D]; ``carry`` is what the tokens before left, ``None`` at the start.
        """
        channels, tail = self._convolve(self.qkv_proj(h), carry)
        num_heads = self.config.num_attention_heads
        by_head = (*h.shape[:2], num_heads, -1)
        q, k, v = torch.split(channels.view(by_head), self.sizes, dim=-1)
        state = None if carry is None else carry.state
        scale = self.config.key_head_dim**-0.5
        if self.config.rule == "gated":
            log_retention = logsigmoid(self.retention_proj(h)) / _RETENTION_TEMPERATURE
            y, state = chunk_gated(scale * q, k, v, log_retention.view(by_head), state)
        else:
            rate = softplus(self.retention_proj(h) + self.rate_bias)  # [B, T, H]
            y, state = chunk_gated_delta(
                scale * normalize(q, dim=-1),
                normalize(k, dim=-1),
                v,
                -self.log_rate.exp() * rate,
                self.beta_proj(h).sigmoid(),
                state,
            )
        gate = silu(self.output_gate(h))  # [B, T, H P]
        return self.out_proj(self.output_norm(y).flatten(2) * gate), LayerCarry(state, tail)

    def _convolve(self, x: Tensor, carry: LayerCarry | None) -> tuple[Tensor, Tensor | None]:
        """Return SiLU of the causal convolution of x [B, T, F], and its last inputs."""
        if self.conv is None:
            return x, None
        num_before = self.config.conv_size - 1
        if carry is None:
            seen = pad(x, (0, 0, num_before, 0))
        else:
            assert carry.conv_tail is not None
            seen = torch.cat([carry.conv_tail, x], dim=1)
        return silu(self.conv(seen.mT).mT), seen[:, seen.shape[1] - num_before :]


class LinearAttentionLayer(nn.Module):
    """A mixer and a gated feed-forward, each behind a norm and beside a residual."""

    def __init__(self, config: LinearAttentionConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.norm = nn.RMSNorm(width, eps=_NORM_EPS)
        self.mixer = LinearAttentionMixer(config)
        self.ffn_norm = nn.RMSNorm(width, eps=_NORM_EPS)
        self.up_proj = nn.Linear(width, 2 * inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, carry: LayerCarry | None) -> tuple[Tensor, LayerCarry]:
        """Return the stream [B, T, D] and what the next tokens need."""
        mixed, carry = self.mixer(self.norm(x), carry)
        x = x + mixed
        gate, up = self.up_proj(self.ffn_norm(x)).chunk(2, dim=-1)
        return x + self.down_proj(silu(gate) * up), carry


class LinearAttentionForCausalLM(PreTrainedModel):
    """Predict the next token; state of constant size carries what was read."""

    config_class = LinearAttentionConfig
    base_model_prefix = "model"
    _tied_weights_keys = {"lm_head.weight": "embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: LinearAttentionConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            LinearAttentionLayer(config) for _ in range(config.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(config.hidden_size, eps=_NORM_EPS)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw the weights of one module; loaded weights stay."""
        if isinstance(module, nn.Conv1d):
            module.reset_parameters()
            return
        super()._init_weights(module)
        if isinstance(module, LinearAttentionMixer) and self.config.rule == "gated_delta":
            # As in Mamba-2: rates from 1 to 16, steps from 0.001 to 0.1, even in the logarithm.
            rate = torch.empty_like(module.log_rate).uniform_(1.0, 16.0)
            init.copy_(module.log_rate, rate.log())
            step_size = torch.empty_like(module.rate_bias).uniform_(-6.9078, -2.3026).exp()
            init.copy_(module.rate_bias, step_size + torch.log(-torch.expm1(-step_size)))

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding."""
        return self.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        """Return the head."""
        return self.lm_head

    def forward(
        self,
        input_ids: Tensor,
        past_key_values: LinearAttentionCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits, the loss where there are labels, and the cache after the last token.

        Args:
            input_ids: [B, T] int64.
            past_key_values: the cache to continue from.
            labels: [B, T] int64 as in every causal model of transformers.
            use_cache: return a cache.
            kwargs: passed on to the loss, such as ``shift_labels``.
        """
        x = self.embed_tokens(input_ids)  # [B, T, D]
        carries = []
        for index, layer in enumerate(self.layers):
            x, carry = layer(x, None if past_key_values is None else past_key_values[index])
            carries.append(carry)
        logits = self.lm_head(self.norm(x))  # [B, T, V]
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=tuple(carries) if use_cache else None
        )
