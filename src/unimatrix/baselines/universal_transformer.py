"""A plain Universal Transformer: one layer of Llama, applied at every depth step."""

from typing import Any

from torch import Tensor, nn
from transformers import LlamaForCausalLM

from unimatrix.baselines.llama import build_llama
from unimatrix.configuration import UniMatrixConfig


class RepeatedLayer(nn.Module):
    """Apply one layer several times; it keeps no cache, for the layer knows one place in it.

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
    """Return a Llama whose one layer is used at every depth step.

    Source: arXiv:1807.03819, without adaptive halting; rotary positions instead of its sinusoids,
    as in the Llama beside it.

    Args:
        config: uses V, D, L (depth steps), H and the special tokens.
        max_tokens: the longest sequence it will see.
        inner_size: F; ``None`` is 8 D / 3.
    """
    one_layer = type(config)(**(config.to_diff_dict() | {"num_hidden_layers": 1}))
    model = build_llama(one_layer, max_tokens=max_tokens, inner_size=inner_size)
    model.model.layers[0] = RepeatedLayer(model.model.layers[0], config.num_hidden_layers)
    return model
