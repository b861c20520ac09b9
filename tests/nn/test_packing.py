"""Documents of a row: laid out as rows of their own, and back."""

import pytest
import torch

from unimatrix.nn.packing import Packing, choose_groups, join_rows, lay_out
from unimatrix.nn.padding import find_padding

IDS = torch.arange(1, 15).view(2, 7)
# Documents of 3, 1 and 3 tokens, and of 2 and 5.
STARTS = torch.tensor([[1, 0, 0, 1, 1, 0, 0], [1, 0, 1, 0, 0, 0, 0]]).bool()


def pack_all(packing: Packing, features: torch.Tensor) -> torch.Tensor:
    return join_rows([group.pack(features) for group in packing.groups])


def test_documents_are_rows_in_one_group() -> None:
    packing = lay_out(STARTS, None, None)
    (group,) = packing.groups
    assert group.lengths is not None
    assert group.lengths.tolist() == [3, 1, 3, 2, 5]
    rows = [
        row[:length].tolist() for row, length in zip(packing.pack(IDS), group.lengths, strict=True)
    ]
    assert rows == [[1, 2, 3], [4], [5, 6, 7], [8, 9], [10, 11, 12, 13, 14]]
    assert torch.equal(packing.unpack(packing.pack(IDS)), IDS)
    assert torch.equal(packing.starts, STARTS)
    assert packing.count_tokens().tolist() == [[0, 1, 2, 0, 0, 1, 2], [0, 1, 0, 1, 2, 3, 4]]


@pytest.mark.parametrize("pass_cost", [0, 1, 3, 100])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
def test_features_of_all_groups_come_back(pass_cost: int, shape: tuple[int, ...]) -> None:
    packing = lay_out(STARTS, None, pass_cost)
    features = torch.randn(2, 7, *shape, dtype=torch.float64, requires_grad=True)
    back = packing.unpack(pack_all(packing, features))
    assert torch.equal(back, features)
    weights = torch.randn_like(back)
    (grad,) = torch.autograd.grad((back * weights).sum(), features)
    assert torch.equal(grad, weights)


def test_padding_is_in_no_document() -> None:
    mask = torch.tensor([[0, 1, 1, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0, 0]])
    padding = find_padding(mask, IDS)
    starts = torch.tensor([[1, 0, 0, 1, 0, 0, 0], [0] * 7]).bool()  # real tokens first
    packing = lay_out(starts, padding, None)
    (group,) = packing.groups
    assert group.lengths is not None
    rows = [
        row[:length].tolist() for row, length in zip(packing.pack(IDS), group.lengths, strict=True)
    ]
    assert rows == [[2, 3, 5], [6]]
    assert torch.equal(packing.unpack(packing.pack(IDS)), IDS * mask)
    assert packing.starts.nonzero().tolist() == [[0, 1], [0, 5]]
    spoilt = packing.pack(IDS.double()).index_fill(1, torch.tensor([2]), torch.inf)
    assert packing.unpack(spoilt)[0, 0] == 0


def test_documents_of_one_length_need_no_lengths() -> None:
    starts = torch.tensor([[1, 0, 1, 0, 1, 0]]).bool()
    (group,) = lay_out(starts, None, 0).groups
    assert group.lengths is None
    assert group.columns.tolist() == [[0, 1], [2, 3], [4, 5]]


def test_similar_lengths_share_a_pass() -> None:
    lengths = torch.tensor([9, 100, 8, 9, 96, 100])
    groups = choose_groups(lengths, 10)
    assert sorted((longest, documents.tolist()) for longest, documents in groups) == [
        (9, [0, 2, 3]),
        (100, [1, 4, 5]),
    ]
    # Passes that cost nothing leave nothing to fill up; those that cost much are one.
    assert sorted(longest for longest, _ in choose_groups(lengths, 0)) == [8, 9, 96, 100]
    for cost in (10_000, None):
        ((longest, documents),) = choose_groups(lengths, cost)
        assert (longest, documents.tolist()) == (100, list(range(6)))


@pytest.mark.parametrize("seed", range(5))
def test_no_other_grouping_costs_less(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 40, (7,), generator=generator)
    found = choose_groups(lengths, 25)
    assert sorted(torch.cat([documents for _, documents in found]).tolist()) == list(range(7))
    cost = sum(longest * len(documents) + 25 for longest, documents in found)
    ordered = lengths.sort().values.tolist()
    for cuts in range(2**6):  # every way to cut the ordered lengths
        ends = [i + 1 for i in range(6) if cuts >> i & 1] + [7]
        begins = [0, *ends[:-1]]
        other = sum(
            ordered[end - 1] * (end - begin) + 25 for begin, end in zip(begins, ends, strict=True)
        )
        assert cost <= other
