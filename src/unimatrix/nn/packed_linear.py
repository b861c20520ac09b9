"""Several linear layers of one input, applied as one."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


def apply_together(layers: Sequence[nn.Linear], x: Tensor) -> Tensor:
    """Return the layers' outputs side by side, [..., sum of widths] for [..., D].

    One large matrix product is faster than several small ones. Layers that are more than their
    weights (an adapter around one, a quantised one, one with a hook) are called one by one, so that
    whatever they are still happens.

    Args:
        layers: all with a bias or all without.
        x: [..., D].
    """
    if len(layers) == 1:
        output: Tensor = layers[0](x)
        return output
    if not all(_is_plain(layer) for layer in layers):
        return torch.cat([layer(x) for layer in layers], dim=-1)
    weight = torch.cat([layer.weight for layer in layers])
    bias = None
    if any(layer.bias is not None for layer in layers):
        bias = torch.cat([layer.bias for layer in layers])
    return linear(x, weight, bias)


def _is_plain(layer: nn.Module) -> bool:
    """Return whether calling a layer does nothing but what its weights say."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks)
    return type(layer).forward is nn.Linear.forward and not any(hooks)
