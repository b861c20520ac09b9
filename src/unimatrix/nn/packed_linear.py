"""Several linear layers of one input, applied as one."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


class PackedWeights(NamedTuple):
    """The weights of several layers side by side.

    Attributes:
        weight: [sum of widths, D].
        bias: [sum of widths], or ``None``.
    """

    weight: Tensor
    bias: Tensor | None


def pack(layers: Sequence[nn.Linear]) -> PackedWeights | None:
    """Join the weights of layers; ``None`` for a single one, or where one is more than its weights.

    Args:
        layers: all with a bias or all without.
    """
    if len(layers) == 1 or not all(is_plain(layer) for layer in layers):
        return None
    bias: Tensor | None = layers[0].bias
    assert all((layer.bias is None) == (bias is None) for layer in layers)
    if bias is not None:
        bias = torch.cat([layer.bias for layer in layers])
    return PackedWeights(torch.cat([layer.weight for layer in layers]), bias)


def apply_together(
    layers: Sequence[nn.Linear], x: Tensor, packed: PackedWeights | None = None
) -> Tensor:
    """Return the layers' outputs side by side, [..., sum of widths] for [..., D].

    One large matrix product is faster than several small ones. Layers that are more than their
    weights (an adapter around one, a quantised one, one with a hook) are called one by one, so that
    whatever they are still happens.

    Args:
        layers: all with a bias or all without.
        x: [..., D].
        packed: what ``pack`` made of them, for layers that are applied several times.
    """
    if packed is None:
        packed = pack(layers)
    if packed is not None:
        return linear(x, packed.weight, packed.bias)
    outputs = [layer(x) for layer in layers]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


def is_plain(layer: nn.Module) -> bool:
    """Return whether calling a linear layer or embedding does only what its weights say."""
    own = type(layer).forward in (nn.Linear.forward, nn.Embedding.forward)
    return own and is_bare(layer)


def is_bare(module: nn.Module) -> bool:
    """Return whether calling a module does only what its class says: no hook, no other forward."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    return not any(hooks) and "forward" not in vars(module)
