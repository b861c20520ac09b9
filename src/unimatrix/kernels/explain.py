"""Why a compiled path cannot stand for a module: the questions that every part of a plan asks."""

from collections.abc import Iterable, Mapping

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


def explain_layers(layers: Mapping[str, nn.Module | None], like: Tensor) -> str | None:
    """Return why linear layers or embeddings are more than their weights, ``None`` if they are not.

    Args:
        layers: by name; ``None`` is none.
        like: a weight on the CPU, of the type that theirs must have.
    """
    for name, layer in layers.items():
        if layer is None:
            continue
        reason = explain_module(name, layer, nn.Linear, nn.Embedding)
        reason = reason or explain_weights(name, layer._parameters.values(), like)
        if reason is not None:
            return reason
    return None


def explain_sizes(
    name: str, weights: Iterable[Tensor], most_weights: float, widths: Iterable[int]
) -> str | None:
    """Return why a pass cannot contain products of these sizes, ``None`` if it can.

    Args:
        name: of the pass.
        weights: of all its layers.
        most_weights: that it may have.
        widths: of what its products read.
    """
    for width in widths:
        if width % NUM_LANES:
            return f"{name} has a width of {width}, no multiple of {NUM_LANES}"
    num_weights = sum(weight.numel() for weight in weights)
    if num_weights > most_weights:
        return f"{name} has {num_weights:,} weights, more than {most_weights:,}"
    return None
