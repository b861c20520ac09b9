"""Decision units are exact; the read of chosen entries is a softmax of E6."""

import math

import pytest
import torch

from unimatrix.ops.cosine_read import (
    DECISION_EPSILON,
    UNIT_GRID,
    compute_decision_units,
    read_chosen,
    take_rows,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("size", [1, 3, 64, 1000])
def test_cosines_of_units_are_exact(size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(size)
    vectors = torch.randn(50, size, generator=generator, dtype=dtype)
    units = compute_decision_units(vectors)
    assert torch.equal(units / UNIT_GRID, (units / UNIT_GRID).round())
    by_matmul = units @ units.T
    by_reversed_matmul = units.flip(1) @ units.flip(1).T
    by_integers = (units / UNIT_GRID).long() @ (units / UNIT_GRID).long().T
    assert torch.equal(by_matmul, by_reversed_matmul)
    assert torch.equal(by_matmul, by_integers.double() * UNIT_GRID**2)
    exact = torch.nn.functional.normalize(vectors.double(), dim=-1)
    assert (by_matmul - exact @ exact.T).abs().max() < DECISION_EPSILON


def test_units_of_odd_vectors() -> None:
    vectors = torch.tensor(
        [[0.0, 0.0], [1e-30, 0.0], [1e30, -1e30], [math.nan, 1.0], [math.inf, 1]]
    )
    units = compute_decision_units(vectors)
    expected = torch.tensor([[0, 0], [0, 0], [0.5**0.5, -(0.5**0.5)], [0, 0], [0, 0]])
    torch.testing.assert_close(units, expected.double(), atol=UNIT_GRID, rtol=0)
    assert vectors[2, 0] == 1e30


def test_take_rows_stays_in_its_row() -> None:
    entries = torch.arange(2 * 3 * 4).view(2, 3, 4)
    index = torch.tensor([[[2, 0]], [[1, 1]]])  # [2, 1, 2]
    rows, firsts = take_rows(index, entries, entries[..., 0])
    assert rows.shape == (2, 1, 2, 4)
    assert torch.equal(rows[0, 0], entries[0, [2, 0]])
    assert torch.equal(rows[1, 0], entries[1, [1, 1]])
    assert torch.equal(firsts, rows[..., 0])
    assert torch.equal(take_rows(index[:1], entries[:1])[0], rows[:1])


def test_nothing_chosen_reads_nothing() -> None:
    queries, keys, values = torch.randn(1, 2, 3), torch.zeros(1, 4, 3), torch.ones(1, 4, 5)
    leaves = [tensor.requires_grad_() for tensor in (queries, keys, values)]
    chosen = torch.tensor([[[-1, -1], [2, -1]]])
    context, weights = read_chosen(*leaves, None, chosen)
    assert weights.tolist() == [[[0.0, 0.0], [1.0, 0.0]]]
    assert context[0].tolist() == [[0.0] * 5, [1.0] * 5]
    context.sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)
