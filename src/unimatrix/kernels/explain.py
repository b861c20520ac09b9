"""Why a compiled path cannot stand for a module: the questions that every part of a plan asks."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from unimatrix.kernels.passes.weights import NUM_LANES


def explain_module(name: str, module: nn.Module, *kinds: type[nn.Module]) -> str | None:
    """Return why calling a module does more than its class says, ``None`` if it does not.

    Args:
        name: of the module, for the reason.
        module: what is to be called.
        kinds: classes that its ``forward`` may be of; none is any.
    """
    hooks = (module._forward_hooks, module._forward_pre_hooks)
    if any(hooks) or module._backward_hooks or module._backward_pre_hooks:
        return f"{name} has a hook"
    if module._compiled_call_impl is not None:
        return f"{name} is compiled by torch"
    if "forward" in vars(module):
        return f"{name} has a forward of its own"
    forward = type(module).forward
    if kinds and not any(forward is kind.forward for kind in kinds):
        return f"{name} is a {type(module).__name__}"
    return None


def explain_weights(name: str, weights: Iterable[Tensor | None], like: Tensor) -> str | None:
    """Return why kernels cannot read these weights, ``None`` if they can.

    Args:
        name: of what they belong to.
        weights: ``None`` is none.
        like: on the CPU, of the type that they must have.
    """
    for weight in weights:
        if weight is None:
            continue
        if type(weight) not in (Tensor, nn.Parameter):
            return f"a weight of {name} is a {type(weight).__name__}"
        if not weight.is_cpu or weight.dtype != like.dtype:
            kind = f"{str(weight.dtype).removeprefix('torch.')} on {weight.device}"
            return f"a weight of {name} is {kind}, others are not"
    return None


class Form(NamedTuple):
    """A layer, and what a pass takes for granted of it.

    Attributes:
        layer: a linear layer or an embedding.
        shape: of its weight.
        has_bias: whether it has a bias, of as many numbers as the weight has rows.
    """

    layer: nn.Module
    shape: tuple[int, int]
    has_bias: bool


def explain_layers(forms: Mapping[str, Form], like: Tensor) -> str | None:
    """Return why passes cannot read these layers in place of calling them, ``None`` if they can.

    Args:
        forms: by name.
        like: a weight on the CPU, of the type that theirs must have.
    """
    for name, (layer, shape, has_bias) in forms.items():
        reason = explain_module(name, layer, nn.Linear, nn.Embedding)
        parameters = layer._parameters
        reason = reason or explain_weights(name, parameters.values(), like)
        if reason is not None:
            return reason
        weight, bias = parameters["weight"], parameters.get("bias")
        if weight is None or weight.shape != shape:
            found = None if weight is None else list(weight.shape)
            return f"the weight of {name} is {found}, not {list(shape)}"
        if (bias is not None) != has_bias or (bias is not None and bias.shape != shape[:1]):
            return f"{name} has {'no' if has_bias else 'a'} bias of {shape[0]}"
    return None


def explain_norm(name: str, norm: nn.Module, like: Tensor) -> str | None:
    """Return why passes cannot read a norm in place of calling it, ``None`` if they can.

    Args:
        name: of the norm.
        norm: of ``build_norm``.
        like: [..., D], a weight on the CPU, of the type that the norm's must have.
    """
    reason = explain_module(name, norm, nn.RMSNorm, nn.LayerNorm)
    reason = reason or explain_weights(name, norm._parameters.values(), like)
    if reason is not None:
        return reason
    known: Any = norm
    parts = [known.weight, *([known.bias] if isinstance(norm, nn.LayerNorm) else [])]
    if known.eps is None or any(part is None or part.shape != like.shape[-1:] for part in parts):
        return f"{name} lacks eps, or a weight or bias of {like.shape[-1]}"
    return None


def explain_sizes(
    name: str, weights: Iterable[Tensor], most_weights: float, widths: Iterable[int]
) -> str | None:
    """Return why a pass cannot contain products of these sizes, ``None`` if it can."""
    for width in widths:
        if width % NUM_LANES:
            return f"{name} has a width of {width}, no multiple of {NUM_LANES}"
    num_weights = sum(weight.numel() for weight in weights)
    if num_weights > most_weights:
        return f"{name} has {num_weights:,} weights, more than {most_weights:,}"
    return None
