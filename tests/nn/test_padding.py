"""Padding: real tokens first, and back in the caller's columns."""

import pytest
import torch

from unimatrix.errors import InputError
from unimatrix.nn.padding import Padding, align_right, cut_mask, find_padding

IDS = torch.arange(1, 13).view(3, 4)
MASK = torch.tensor([[0, 1, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0]])


def find() -> Padding:
    padding = find_padding(MASK, IDS)
    assert padding is not None
    return padding


def test_real_tokens_come_first_in_their_order() -> None:
    padding = find()
    assert padding.lengths.tolist() == [2, 4, 0]
    packed = padding.pack(IDS)
    assert packed[0, :2].tolist() == [2, 4]
    assert packed[1].tolist() == IDS[1].tolist()


@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
def test_features_come_back_to_their_columns_and_zero_to_padding(shape: tuple[int, ...]) -> None:
    padding, features = find(), torch.randn(3, 4, *shape)
    packed = padding.pack(features)
    assert torch.equal(packed[0, 0], features[0, 1])
    is_real = MASK.bool().view(3, 4, *len(shape) * [1])
    assert torch.equal(padding.unpack(packed), torch.where(is_real, features, 0.0))
    # Whatever stands at padding, no number comes of it.
    spoilt = torch.where(is_real, features, torch.nan)
    unpacked = padding.unpack(padding.pack(spoilt).masked_fill(~padding.pack(is_real), torch.inf))
    assert torch.equal(unpacked, torch.where(is_real, features, 0.0))


def test_gradients_pass_real_tokens_alone() -> None:
    features = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    padding = find()
    (grad,) = torch.autograd.grad(padding.unpack(padding.pack(features)).sum(), features)
    assert torch.equal(grad, MASK.unsqueeze(-1).expand(3, 4, 2).double())


def test_no_padding_is_none() -> None:
    assert find_padding(None, IDS) is None
    assert find_padding(torch.ones(3, 4), IDS) is None
    # The mask of a cache and of what follows; the columns of the cache do not count.
    beside = torch.cat([torch.zeros(3, 2), torch.ones(3, 4)], dim=1)
    assert find_padding(beside, IDS, num_past=2) is None


def test_the_last_columns_of_a_mask_count() -> None:
    beside = torch.cat([torch.ones(3, 2, dtype=torch.int64), MASK], dim=1)
    assert torch.equal(cut_mask(beside, IDS, 2), MASK.bool())
    assert torch.equal(cut_mask(MASK, IDS, 2), MASK.bool())
    with pytest.raises(InputError, match=r"shape \[3, 6\]; pass \[3, 4\], one value per token"):
        cut_mask(beside, IDS, 0)
    with pytest.raises(InputError, match=r"or \[3, 7\] to cover the cache's 3 columns"):
        cut_mask(beside, IDS, 3)


def test_padding_is_moved_to_the_left_where_a_row_ends_with_it() -> None:
    trailing = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1]]).bool()
    ids, mask = align_right(IDS[:2], trailing)
    assert ids[0, 2:].tolist() == [2, 3]
    assert mask.tolist() == [[False, False, True, True], 4 * [True]]
    assert ids[1].tolist() == IDS[1].tolist()
    ending = MASK[:2].bool()
    assert align_right(IDS[:2], ending)[1] is ending
    with pytest.raises(InputError, match=r"rows \[2\] of input_ids hold no token"):
        align_right(IDS, MASK.bool())
