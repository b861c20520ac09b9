"""Why a compiled path cannot stand for a module: the questions that every part of a plan asks."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from unimatrix.errors import InputError
from unimatrix.kernels.passes.weights import NUM_LANES
from unimatrix.ops.backends import compiles_native, require_backend
from unimatrix.ops.checks import is_autocast

FEWEST_ROWS = 17
"""Positions below which torch is as fast as a pass and needs no compiler."""
MOST_WEIGHTS = 600_000
"""Weights of one pass above which a library's products are as fast."""
_DTYPES = (torch.float32, torch.float64)


def explain_call(backend: str, weight: Tensor, num_rows: int) -> str | None:
    """Return why no compiled pass may run in this call, ``None`` if one may.

    Args:
        backend: of the passes: ``auto``, ``reference`` or ``native``.
        weight: any of the model's.
        num_rows: positions of the call.

    Raises:
        InputError: if there is no such back end, or ``native`` is asked for and cannot run.
    """
    kind = f"{str(weight.dtype).removeprefix('torch.')} on {weight.device.type}"
    is_able = weight.device.type == "cpu" and weight.dtype in _DTYPES
    if backend != "auto" and require_backend("fused_passes", backend) == "native":
        if not is_able:
            raise InputError(
                f"backend 'native' takes float32 or float64 on the CPU, not {kind}; pass auto."
            )
        num_rows = FEWEST_ROWS
    if backend == "reference":
        return "the back end 'reference' was chosen"
    if not is_able:
        return f"the model is {kind}"
    if is_autocast("cpu"):
        return "autocast is on"
    if num_rows < FEWEST_ROWS:
        return f"{num_rows} positions are fewer than {FEWEST_ROWS}"
    if backend == "auto" and not compiles_native():
        return "compiled kernels failed their check in this process"
    return None


def explain_module(name: str, module: nn.Module, *kinds: type[nn.Module]) -> str | None:
    """Return why calling a module does more than its class says, ``None`` if it does not.

    Args:
        name: of the module, for the reason.
        module: what is to be called.
        kinds: classes that its ``forward`` may be of; none is any.
    """
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
        return f"{name} has a hook"
    if "forward" in vars(module):
        return f"{name} has a forward of its own"
    if kinds and type(module).forward not in [kind.forward for kind in kinds]:
        return f"{name} is a {type(module).__name__}"
    return None


def explain_weights(name: str, weights: Iterable[Tensor | None], like: Tensor) -> str | None:
    """Return why weights are none that kernels read, ``None`` if they are.

    Args:
        name: of what they belong to.
        weights: ``None`` is none.
        like: of the device and type that they must have.
    """
    for weight in weights:
        if weight is None:
            continue
        if type(weight) not in (Tensor, nn.Parameter):
            return f"a weight of {name} is a {type(weight).__name__}"
        if weight.device != like.device or weight.dtype != like.dtype:
            kind = f"{str(weight.dtype).removeprefix('torch.')} on {weight.device}"
            return f"a weight of {name} is {kind}, others are not"
    return None


def explain_layers(layers: Mapping[str, nn.Module | None], like: Tensor) -> str | None:
    """Return why linear layers or embeddings are more than their weights, ``None`` if they are not.

    Args:
        layers: by name; ``None`` is none.
        like: a weight of the device and type that theirs must have.
    """
    for name, layer in layers.items():
        if layer is None:
            continue
        reason = explain_module(name, layer, nn.Linear, nn.Embedding)
        reason = reason or explain_weights(name, layer.parameters(recurse=False), like)
        if reason is not None:
            return reason
    return None


def explain_sizes(
    name: str, weights: Iterable[Tensor], most_weights: float, widths: Iterable[int]
) -> str | None:
    """Return why products are none that a pass takes with it, ``None`` if they are.

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
