"""Activation checkpointing of a module whose arguments and results are nested tuples."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from transformers.modeling_layers import GradientCheckpointingLayer

Checkpoint = Callable[..., Any]


def checkpoint_nested(checkpoint: Checkpoint, function: Callable[..., Any], *args: Any) -> Any:
    """Return ``function(*args)``, to be computed again in the backward pass.

    The reentrant form of ``torch.utils.checkpoint`` sees tensors that are arguments or results
    themselves, and none inside tuples: their gradients would go past it. So it gets leaves alone.

    Args:
        checkpoint: as ``torch.utils.checkpoint.checkpoint``, with its options bound.
        function: takes and returns tensors and other values in nested (named) tuples.
        args: of ``function``.
    """
    if torch.compiler.is_compiling():
        # A graph holds the form that is not reentrant, which sees every tensor.
        return checkpoint(function, *args)
    leaves, spec = tree_flatten(args)
    spec_of_results: TreeSpec | None = None

    def run_on_leaves(*leaves: Any) -> tuple[Any, ...]:
        nonlocal spec_of_results
        results, spec_of_results = tree_flatten(function(*tree_unflatten(leaves, spec)))
        return tuple(results)

    results = checkpoint(run_on_leaves, *leaves)
    assert spec_of_results is not None
    return tree_unflatten(results, spec_of_results)


class CheckpointedLayer(GradientCheckpointingLayer):
    """A layer of transformers that may be computed again, with nested arguments and results.

    Whoever enables checkpointing sets ``gradient_checkpointing`` and
    ``_gradient_checkpointing_func``, as on every layer of transformers.
    """

    @property
    def _gradient_checkpointing_func(self) -> Checkpoint:
        return partial(checkpoint_nested, self._checkpoint)

    @_gradient_checkpointing_func.setter
    def _gradient_checkpointing_func(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    @_gradient_checkpointing_func.deleter
    def _gradient_checkpointing_func(self) -> None:
        del self._checkpoint
