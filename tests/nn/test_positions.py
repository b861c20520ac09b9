"""Positions of real tokens, from a table of limited length."""

import pytest
import torch
from torch import nn
from unimatrix.nn.positions import add_positions

from unimatrix.errors import InputError

X = torch.randn(2, 4, 3, dtype=torch.float64)


def build_table(num_rows: int = 9) -> nn.Embedding:
    return nn.Embedding(num_rows, 3, dtype=torch.float64)


def test_each_token_has_the_row_of_its_number() -> None:
    table, before = build_table(), torch.tensor([0, 5])
    located = add_positions(table, X, before, None, is_first=False)
    for row, t in [(row, t) for row in range(2) for t in range(4)]:
        expected = X[row, t] + table.weight[int(before[row]) + t]
        assert torch.equal(located[row, t], expected)


def test_two_parts_equal_one() -> None:
    table, none = build_table(), torch.zeros(2, dtype=torch.int64)
    whole = add_positions(table, X, none, None, is_first=True)
    first = add_positions(table, X[:, :1], none, None, is_first=True)
    second = add_positions(table, X[:, 1:], none + 1, None, is_first=False)
    assert torch.equal(torch.cat([first, second], dim=1), whole)


@pytest.mark.parametrize("is_first", [True, False])
def test_more_tokens_than_the_table_has_are_refused(is_first: bool) -> None:
    table, none = build_table(3), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(InputError, match="reaches 4 tokens and the position table has 3"):
        add_positions(table, X, none, None, is_first)
    # Padding has no position.
    located = add_positions(table, X, none, torch.tensor([3, 1]), is_first)
    assert torch.equal(located[0, 2], X[0, 2] + table.weight[2])
    with pytest.raises(InputError, match="reaches 4 tokens"):
        add_positions(table, X, none, torch.tensor([3, 4]), is_first)
    with pytest.raises(InputError, match="reaches 5 tokens"):
        add_positions(table, X, none + 2, torch.tensor([3, 1]), False)


def test_gradients() -> None:
    before = torch.tensor([0, 5])
    leaves = (X.clone().requires_grad_(), build_table().weight.detach().requires_grad_())

    def locate(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        table = build_table()
        del table.weight
        table.weight = weight
        return add_positions(table, x, before, None, is_first=False)

    assert torch.autograd.gradcheck(locate, leaves)
