"""The feature of the previous real token: against a loop, in parts, and with padding."""

import pytest
import torch

from unimatrix.nn.previous_token import shift_to_previous, take_last

FEATURES = pytest.mark.parametrize("shape", [(), (3,)])


@FEATURES
def test_each_position_sees_the_one_before(shape: tuple[int, ...]) -> None:
    features, previous = torch.randn(2, 4, *shape), torch.randn(2, *shape)
    for before in (previous, None):
        shifted = shift_to_previous(features, before)
        first = torch.zeros(2, *shape) if before is None else before
        assert torch.equal(shifted[:, 0], first)
        for t in range(1, 4):
            assert torch.equal(shifted[:, t], features[:, t - 1])


@FEATURES
def test_two_parts_equal_one(shape: tuple[int, ...]) -> None:
    features = torch.randn(2, 5, *shape)
    first, second = features[:, :2], features[:, 2:]
    parts = [
        shift_to_previous(first, None),
        shift_to_previous(second, take_last(first, None, None)),
    ]
    assert torch.equal(torch.cat(parts, dim=1), shift_to_previous(features, None))


@FEATURES
def test_padding_is_not_remembered(shape: tuple[int, ...]) -> None:
    features, previous = torch.randn(3, 4, *shape), torch.randn(3, *shape)
    lengths = torch.tensor([4, 2, 0])
    last = take_last(features, lengths, previous)
    assert torch.equal(last, torch.stack([features[0, 3], features[1, 1], previous[2]]))
    assert not take_last(features, lengths, None)[2].any()
    assert torch.equal(take_last(features, None, previous), features[:, -1])


def test_the_dtype_is_that_of_the_features() -> None:
    features, previous = torch.randn(2, 3, 4).bfloat16(), torch.randn(2, 4)
    assert shift_to_previous(features, previous).dtype == torch.bfloat16
    assert take_last(features, torch.tensor([0, 1]), previous).dtype == torch.bfloat16


def test_gradients() -> None:
    leaves = (torch.randn(2, 3, 2).double(), torch.randn(2, 2).double())
    leaves = tuple(leaf.requires_grad_() for leaf in leaves)
    assert torch.autograd.gradcheck(shift_to_previous, leaves)
    lengths = torch.tensor([2, 0])
    assert torch.autograd.gradcheck(lambda *given: take_last(given[0], lengths, given[1]), leaves)
