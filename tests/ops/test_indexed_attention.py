"""Attention around places (E26, E27): every back end against the reference, and by hand."""

import pytest
import torch
from torch import Tensor

from tests.ops.oracle import Outputs, candidates, compare_with_reference
from unimatrix.errors import InputError
from unimatrix.ops.backends import BACKENDS
from unimatrix.ops.indexed_attention import (
    BEFORE,
    MOST_MATCHED,
    NUM_OFFSETS,
    Entries,
    attend_entries,
    find_entries,
    share_heads,
)

OP = "indexed_attention"
ALL, CANDIDATES = BACKENDS[OP], candidates(OP)
B, T, S, P, H, C = 2, 7, 90, 3, 2, 5


def draw_entries(seed: int = 0, *, dtype: torch.dtype = torch.float64, width: int = C):
    """Return text, distances and the floats of a call."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    text = torch.randint(0, 3, (B, S), generator=generator)
    text[0, :8] = -1
    distances = torch.randint(-1, S - 10, (B, T, P), generator=generator, dtype=torch.int32)
    distances[1, 2] = -1  # nothing to read
    leaves = {
        "query": draw(B, T, H, width),
        "keys": draw(B, 2 * S, H, width),
        "values": draw(B, S, H, width),
        "offset_bias": draw(B, T, H, NUM_OFFSETS),
        "place_bias": draw(B, T, H, P),
        "match_bias": draw(H, MOST_MATCHED + 1),
    }
    return text, distances, leaves


@pytest.mark.parametrize("backend", ALL)
def test_which_tokens_are_read(backend: str) -> None:
    text = torch.arange(200).unsqueeze(0) % 7
    distances = torch.tensor([[[100, 5, -1], [199, 150, 60]]], dtype=torch.int32)
    rows, matched, tokens = find_entries(text, distances, window=160, backend=backend)
    assert torch.equal(tokens, (rows.long() // 2 % 7).where(rows >= 0, 0))
    rows, matched = rows.view(2, 3, NUM_OFFSETS), matched.view(2, 3, NUM_OFFSETS)
    # The first position is column 198: its place 98 is read from 66 to 145, all known.
    columns = torch.arange(98 - BEFORE, 98 - BEFORE + NUM_OFFSETS)
    assert torch.equal(rows[0, 0].long(), 2 * columns + 1)
    # Every seventh token continues what stands there.
    goes_on = (198 - (columns - 1)) % 7 == 0
    assert torch.equal(matched[0, 0].long(), torch.where(goes_on, MOST_MATCHED, 0))
    # Around 193 up to the position itself; what a key sees ahead is known up to column 187.
    seen = torch.arange(193 - BEFORE, 199)
    expected = torch.full((NUM_OFFSETS,), -1)
    expected[: len(seen)] = 2 * seen + (seen + 11 <= 198)
    assert torch.equal(rows[0, 1].long(), expected)
    assert (rows[0, 2] == -1).all()
    # Place 0 is forgotten; of what is around place 49 only what is at most 143 tokens back is left.
    assert (rows[1, 0] == -1).all()
    around = rows[1, 1][rows[1, 1] >= 0].long()
    assert torch.equal(around // 2, torch.arange(199 - 143, 49 - BEFORE + NUM_OFFSETS))


@pytest.mark.parametrize("window", [40, 80, 200])
@pytest.mark.parametrize("backend", CANDIDATES)
def test_entries_are_those_of_the_reference(backend: str, window: int) -> None:
    for seed in range(4):
        text, distances, _ = draw_entries(seed)
        found = find_entries(text, distances, window=window, backend=backend)
        expected = find_entries(text, distances, window=window, backend="reference")
        assert torch.equal(found.rows, expected.rows)
        assert torch.equal(found.matched, expected.matched)
        assert torch.equal(found.token_ids, expected.token_ids)
        assert (found.rows >= 0).any()


@pytest.mark.parametrize("width", [1, 5, 8, 32])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("backend", CANDIDATES)
def test_reading_is_that_of_the_reference(backend: str, dtype: torch.dtype, width: int) -> None:
    text, distances, leaves = draw_entries(dtype=dtype, width=width)
    entries = find_entries(text, distances, window=200)

    def run(backend: str, **floats: Tensor) -> Outputs:
        context, weights = attend_entries(entries, **floats, backend=backend)
        return {"context": context, "weights": weights}

    compare_with_reference(OP, backend, run, leaves)


@pytest.mark.parametrize("backend", ALL)
def test_reading_by_hand(backend: str) -> None:
    text, distances, leaves = draw_entries(3)
    entries = find_entries(text, distances, window=200, backend=backend)
    context, weights = attend_entries(entries, **leaves, backend=backend)
    b, t, h = 1, 4, 1
    scores = {}
    for e, row in enumerate(entries.rows[b, t].tolist()):
        if row >= 0:
            scores[e] = leaves["query"][b, t, h] @ leaves["keys"][b, row, h]
            scores[e] += leaves["offset_bias"][b, t, h, e % NUM_OFFSETS]
            scores[e] += leaves["place_bias"][b, t, h, e // NUM_OFFSETS]
            scores[e] += leaves["match_bias"][h, entries.matched[b, t, e]]
    total = 1 + sum(score.exp() for score in scores.values())
    expected = torch.zeros_like(weights[b, t, h])
    for e, score in scores.items():
        expected[e] = score.exp() / total
    torch.testing.assert_close(weights[b, t, h], expected)
    mixed = sum(expected[e] * leaves["values"][b, entries.rows[b, t, e] // 2, h] for e in scores)
    torch.testing.assert_close(context[b, t, h], mixed)
    assert (weights[1, 2] == 0).all()
    assert (context[1, 2] == 0).all()


@pytest.mark.parametrize("backend", ALL)
def test_scores_of_any_size(backend: str) -> None:
    text, distances, leaves = draw_entries(5)
    entries = find_entries(text, distances, window=200)
    for factor in (1e4, -1e4):
        leaves["query"] = (leaves["query"] * factor).requires_grad_()
        context, weights = attend_entries(entries, **leaves, backend=backend)
        (context.sum() + weights.sum()).backward()
        assert all(x.isfinite().all() for x in (context, weights, leaves["query"].grad))
        leaves["query"] = leaves["query"].detach()


def test_wrong_arguments() -> None:
    text, distances, leaves = draw_entries()
    entries = find_entries(text, distances, window=200)
    with pytest.raises(InputError, match="text"):
        find_entries(text.float(), distances, window=200)
    with pytest.raises(InputError, match="distances"):
        find_entries(text, distances.long(), window=200)
    with pytest.raises(InputError, match="not available for indexed_attention"):
        find_entries(text, distances, window=200, backend="parallel")
    with pytest.raises(InputError, match="offset_bias"):
        attend_entries(entries, **{**leaves, "offset_bias": leaves["offset_bias"][..., 1:]})
    with pytest.raises(InputError, match="keys has 179 rows for 90 values"):
        attend_entries(entries, **{**leaves, "keys": leaves["keys"][:, 1:]})
    with pytest.raises(InputError, match="240 entries for 2 places"):
        attend_entries(entries, **{**leaves, "place_bias": leaves["place_bias"][..., 1:]})
    with pytest.raises(InputError, match=r"entries\.matched"):
        attend_entries(entries._replace(matched=entries.matched[:, 1:]), **leaves)
    halves = {name: leaf.half() for name, leaf in leaves.items()}
    with pytest.raises(
        InputError, match=r"takes float32 or float64 on the CPU, not torch\.float16"
    ):
        attend_entries(entries, **halves, backend="native")
    context, _ = attend_entries(Entries(*entries), **halves)
    assert context.dtype == torch.float16


def draw_shares(dtype: torch.dtype) -> dict[str, Tensor]:
    """Return scores and weights; some entries and some positions have nothing."""
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(B, T, 3, generator=generator, dtype=torch.float64)
    weights = torch.rand(B, T, H, 20, generator=generator, dtype=torch.float64)
    weights[..., 4:9] = 0
    weights[0, 1] = 0
    return {
        "scores": scores.to(dtype),
        "head_scores": torch.randn(B, T, H, generator=generator, dtype=torch.float64).to(dtype),
        "weights": (weights / weights.sum(dim=-1, keepdim=True).clamp_min(1) * 0.9).to(dtype),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", CANDIDATES)
def test_shares_of_heads_are_those_of_the_reference(backend: str, dtype: torch.dtype) -> None:
    leaves = draw_shares(dtype)
    leaves["scores"][:, :, 1] = -torch.inf  # nothing there

    exists = leaves["weights"] > 0

    def run(backend: str, weights: Tensor, **given: Tensor) -> Outputs:
        shares = share_heads(weights=weights * exists, **given, backend=backend)
        return {"shares": shares.clamp_min(-1e3), "none": shares.isneginf()}

    compare_with_reference(OP, backend, run, leaves)


@pytest.mark.parametrize("backend", ALL)
def test_shares_sum_to_one(backend: str) -> None:
    leaves = draw_shares(torch.float64)
    leaves["scores"] += 500  # no power of it is a number
    shares = share_heads(**leaves, backend=backend)
    torch.testing.assert_close(shares.exp().sum(dim=-1), torch.ones(B, T, dtype=torch.float64))
    assert shares[..., 3 + 4 : 3 + 9].isneginf().all()
    with pytest.raises(InputError, match="head_scores"):
        share_heads(leaves["scores"], leaves["head_scores"][:, :1], leaves["weights"])
    with pytest.raises(InputError, match="scores has dtype"):
        share_heads(leaves["scores"].float(), *list(leaves.values())[1:])
