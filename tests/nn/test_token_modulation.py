"""A factor per token and channel (E12)."""

import math

import torch
from torch.func import functional_call

from tests.models import SMALL, draw_ids
from unimatrix.configuration import UniMatrixConfig
from unimatrix.nn.token_modulation import TokenModulation


def build() -> TokenModulation:
    return TokenModulation(UniMatrixConfig(**SMALL, modulation_size=4)).double()


@torch.no_grad()
def test_equals_one_and_a_share_of_each_channel() -> None:
    modulation, ids = build(), draw_ids(2, 5)
    factors = modulation(ids)
    assert factors.shape == (2, 5, 12)
    for row, t in [(row, t) for row in range(2) for t in range(5)]:
        vector = modulation.embed.weight[ids[row, t]]
        for channel in range(12):
            logit = (modulation.proj.weight[channel] @ vector).item()
            expected = 1 + 1 / (1 + math.exp(-logit))
            assert math.isclose(factors[row, t, channel].item(), expected, rel_tol=1e-12)


def test_gradients() -> None:
    modulation, ids = build(), draw_ids(2, 5)
    names = [name for name, _ in modulation.named_parameters()]

    def run(*weights: torch.Tensor) -> torch.Tensor:
        factors: torch.Tensor = functional_call(
            modulation, dict(zip(names, weights, strict=True)), ids
        )
        return factors

    leaves = [weight.detach().clone().requires_grad_() for weight in modulation.parameters()]
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
