"""The norm that a configuration names (E22): against sums over the features."""

import pytest
import torch

from tests.models import SMALL
from unimatrix.configuration import UniMatrixConfig
from unimatrix.nn.norm import build_norm


@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
@torch.no_grad()
def test_equals_sums_over_the_features(kind: str) -> None:
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
def test_gradients(kind: str) -> None:
    norm = build_norm(UniMatrixConfig(**SMALL, norm_type=kind)).double()
    x = torch.randn(1, 2, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(norm, (x,), fast_mode=True)
