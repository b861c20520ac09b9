"""The short convolution (E19): against a loop, in parts, and with padding."""

import pytest
import torch

from unimatrix.nn.short_convolution import ShortConvolution


def build(kernel: int, width: int = 3) -> ShortConvolution:
    convolution = ShortConvolution(width, kernel).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        convolution.weight.copy_(torch.randn(kernel, width, generator=generator))
    return convolution


@pytest.mark.parametrize("kernel", [2, 4])
def test_equals_the_sum_over_the_last_tokens(kernel: int) -> None:
    convolution = build(kernel)
    h = torch.randn(2, 6, 3, dtype=torch.float64)
    mixed, recent = convolution(h, None, None)
    for t in range(6):
        filters = [(back, convolution.weight[-1 - back]) for back in range(min(kernel, t + 1))]
        expected = sum(h[:, t - back] * weight for back, weight in filters)
        torch.testing.assert_close(mixed[:, t], expected)
    assert torch.equal(recent, h[:, -(kernel - 1) :])


@pytest.mark.parametrize("split", [1, 2, 5])
def test_two_parts_equal_one(split: int) -> None:
    convolution = build(4)
    h = torch.randn(2, 6, 3, dtype=torch.float64)
    whole, recent = convolution(h, None, None)
    first, carried = convolution(h[:, :split], None, None)
    second, last = convolution(h[:, split:], carried, None)
    assert torch.equal(torch.cat([first, second], dim=1), whole)
    assert torch.equal(last, recent)


def test_padding_is_not_remembered() -> None:
    convolution = build(4)
    h = torch.randn(3, 6, 3, dtype=torch.float64)
    before = torch.randn(3, 3, 3, dtype=torch.float64)
    _, recent = convolution(h, before, torch.tensor([6, 2, 0]))
    assert torch.equal(recent[0], h[0, 3:])
    assert torch.equal(recent[1], torch.cat([before[1, 2:], h[1, :2]]))
    assert torch.equal(recent[2], before[2])


def test_gradients() -> None:
    convolution = build(3)
    h = torch.randn(1, 4, 3, dtype=torch.float64, requires_grad=True)
    before = torch.randn(1, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *given: convolution(*given, None), (h, before))


@pytest.mark.parametrize("learns", [False, True])
def test_what_is_carried_holds_no_more_than_its_tokens(learns: bool) -> None:
    """With a gradient too: a cache that is detached outlives its graph."""
    h = torch.randn(2, 50, 3, dtype=torch.float64, requires_grad=learns)
    recent = build(4).take_recent(h, None, None).detach()
    assert recent.untyped_storage().nbytes() == recent.numel() * recent.itemsize
