"""A layer that is computed again, with nested arguments and results."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from unimatrix.nn.checkpointing import CheckpointedLayer, checkpoint_nested


class Pair(NamedTuple):
    """Two tensors, one of which may not be there."""

    one: Tensor
    two: Tensor | None


class Layer(CheckpointedLayer):
    """Takes and returns what is nested, and something that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(3, dtype=torch.float64))
        self.num_calls = 0

    def forward(self, x: Tensor, pair: Pair, states: dict[str, Any]) -> tuple[Tensor, Pair, str]:
        self.num_calls += 1
        y = x * self.weight + pair.one.sin() + states["held"].cos()
        return y, Pair(y * states["held"], None), "told"


def run(layer: Layer, leaves: list[Tensor]) -> list[Tensor]:
    """Return the gradients of a sum by everything that is nested."""
    x, one, held = leaves
    y, pair, word = layer(x, Pair(one, None), {"held": held})
    assert word == "told"
    assert pair.two is None
    (y.square().sum() + pair.one.exp().sum()).backward()
    return [leaf.grad for leaf in (*leaves, layer.weight)]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradients_reach_what_is_nested(use_reentrant: bool) -> None:
    results, layer = [], Layer().train()
    for is_checkpointed in (False, True):
        layer.zero_grad()
        layer.num_calls = 0
        layer.gradient_checkpointing = is_checkpointed
        layer._gradient_checkpointing_func = lambda *given: checkpoint(
            *given, use_reentrant=use_reentrant
        )
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randn(3, 2, 3, generator=generator, dtype=torch.float64)
        leaves = [leaf.clone().requires_grad_() for leaf in drawn]
        results.append([grad.clone() for grad in run(layer, leaves)])
        assert layer.num_calls == 1 + is_checkpointed
    torch.testing.assert_close(*results)


def test_nothing_is_computed_again_in_evaluation() -> None:
    layer = Layer().eval()
    layer.gradient_checkpointing = True
    layer._gradient_checkpointing_func = checkpoint
    run(layer, [torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)])
    assert layer.num_calls == 1


def test_the_checkpoint_sees_leaves_alone() -> None:
    seen = []

    def note(function: Any, *leaves: Any) -> Any:
        seen.append(leaves)
        return function(*leaves)

    tensors = [torch.randn(2) for _ in range(3)]
    nested = (tensors[0], Pair(tensors[1], None), {"held": tensors[2]})
    result = checkpoint_nested(note, lambda *given: given, *nested)
    assert all(isinstance(leaf, Tensor) or leaf is None for leaf in seen[0])
    assert type(result[1]) is Pair
    assert result[2]["held"] is tensors[2]
