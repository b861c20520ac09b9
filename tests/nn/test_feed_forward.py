"""Norms (E22) and feed-forward networks (E23): against sums over features and weights."""

import math
from typing import Any

import pytest
import torch
from torch.func import functional_call

from tests.models import SMALL
from unimatrix.configuration import UniMatrixConfig
from unimatrix.nn.feed_forward import (
    FeedForward,
    GatedFeedForward,
    build_feed_forward,
    build_norm,
)

KINDS = pytest.mark.parametrize("kind", ["gelu", "swiglu"])


def build(kind: str, **changes: Any) -> FeedForward | GatedFeedForward:
    sizes = {"feed_forward_type": kind, "intermediate_size": 7}
    return build_feed_forward(UniMatrixConfig(**(SMALL | sizes | changes))).double()


@KINDS
@torch.no_grad()
def test_equals_sums_over_the_weights(kind: str) -> None:
    network, h = build(kind).eval(), torch.randn(2, 3, 12, dtype=torch.float64)
    output = network(h)
    for row, t in [(row, t) for row in range(2) for t in range(3)]:
        expected = torch.zeros(12, dtype=torch.float64)
        if isinstance(network, FeedForward):
            expected += network.down_proj.bias
        for f in range(7):
            up = (network.up_proj.weight[f] @ h[row, t]).item()
            if isinstance(network, FeedForward):
                up += network.up_proj.bias[f].item()
                inner = up * (1 + math.erf(up / math.sqrt(2))) / 2
            else:
                gate = (network.gate_proj.weight[f] @ h[row, t]).item()
                inner = gate / (1 + math.exp(-gate)) * up
            expected += inner * network.down_proj.weight[:, f]
        torch.testing.assert_close(output[row, t], expected)


@KINDS
def test_gradients(kind: str) -> None:
    network = build(kind).eval()
    names = [name for name, _ in network.named_parameters()]

    def run(h: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = functional_call(network, dict(zip(names, weights, strict=True)), h)
        return output

    leaves = [torch.randn(2, 3, 12, dtype=torch.float64), *network.parameters()]
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


@KINDS
def test_the_inner_features_are_dropped_in_training_alone(kind: str) -> None:
    network, h = build(kind, dropout=0.5), torch.randn(2, 3, 12, dtype=torch.float64)
    expected = network.eval()(h)
    assert torch.equal(network(h), expected)
    torch.manual_seed(0)
    assert not torch.allclose(network.train()(h), expected)


def test_the_layers_that_see_the_input() -> None:
    gelu, swiglu = build("gelu"), build("swiglu")
    assert gelu.up_projs == [gelu.up_proj]
    assert swiglu.up_projs == [swiglu.gate_proj, swiglu.up_proj]
    assert all("bias" not in name for name, _ in swiglu.named_parameters())


@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
@torch.no_grad()
def test_norm_equals_sums_over_the_features(kind: str) -> None:
    norm = build_norm(UniMatrixConfig(**SMALL, norm_type=kind, layer_norm_eps=0.3)).double()
    for weight in norm.parameters():
        weight.copy_(torch.randn(12, dtype=torch.float64))
    x = torch.randn(2, 3, 12, dtype=torch.float64)
    for row, t in [(row, t) for row in range(2) for t in range(3)]:
        centred = x[row, t]
        if kind == "layer_norm":
            centred = centred - sum(centred.tolist()) / 12
        scale = (sum(number**2 for number in centred.tolist()) / 12 + 0.3) ** 0.5
        expected = centred / scale * norm.weight
        expected = expected + norm.bias if kind == "layer_norm" else expected
        torch.testing.assert_close(norm(x)[row, t], expected)
    assert hasattr(norm, "bias") == (kind == "layer_norm")


@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
def test_gradients_of_norms(kind: str) -> None:
    norm = build_norm(UniMatrixConfig(**SMALL, norm_type=kind)).double()
    x = torch.randn(1, 2, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(norm, (x,), fast_mode=True)
