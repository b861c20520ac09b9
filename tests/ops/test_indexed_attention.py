"""Attention around places (E26, E27): every back end against the reference, and by hand."""

import math

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
    REACH,
    Entries,
    attend_entries,
    find_entries,
    share_heads,
    share_targets,
    sum_around,
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


def draw_boundary(leaves: dict[str, Tensor]) -> None:
    """Add boundaries to the floats of a call."""
    generator, width = torch.Generator().manual_seed(5), leaves["query"].shape[-1]
    boundary = torch.randn(H, 2 * width + 1, generator=generator, dtype=torch.float64)
    leaves["boundary"] = (boundary * width**-0.5).to(leaves["query"].dtype)


@pytest.mark.parametrize("is_bounded", [False, True])
@pytest.mark.parametrize("width", [1, 5, 8, 32])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("backend", CANDIDATES)
def test_reading_is_that_of_the_reference(
    backend: str, dtype: torch.dtype, width: int, is_bounded: bool
) -> None:
    text, distances, leaves = draw_entries(dtype=dtype, width=width)
    entries = find_entries(text, distances, window=200)
    if is_bounded:
        draw_boundary(leaves)

    def run(backend: str, **floats: Tensor) -> Outputs:
        context, weights = attend_entries(entries, **floats, backend=backend)
        return {"context": context, "weights": weights}

    compare_with_reference(OP, backend, run, leaves)


def draw_runs(
    dtype: torch.dtype, num_before: int, window: int = 200
) -> tuple[Entries, dict[str, Tensor]]:
    """Return entries and floats of positions that keep their places for a while.

    Some places are just behind the positions, where entries appear and keys come to see ahead from
    position to position; some at the beginning of the text; some are nowhere.
    """
    generator, num_tokens = torch.Generator().manual_seed(1), 75
    num_columns = num_before + num_tokens
    now = torch.arange(num_before, num_columns).view(1, -1, 1)
    # For each position the first of those that have its places: runs of 1 to 40 positions.
    starts = torch.zeros(B, num_tokens, dtype=torch.int64)
    for batch, firsts in enumerate([[1, 2, 42, 60], [7, 16, 33]]):
        for first in firsts:
            starts[batch, first:] = first
    drawn = torch.randint(0, 60, (B, num_tokens, P), generator=generator)
    drawn[..., 0] = torch.randint(0, 4, (B, num_tokens), generator=generator)
    drawn = drawn.gather(1, starts.unsqueeze(-1).expand(-1, -1, P))
    first_now = starts.unsqueeze(-1) + num_before
    distances = (now - (first_now - drawn)).masked_fill(drawn > first_now, -1).int()
    distances[0, 42:, 1] = -1
    distances[1, 16:33] = -1
    text = torch.randint(0, 3, (B, num_columns), generator=generator)
    entries = find_entries(text, distances, window=window, backend="reference")
    leaves = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for name, shape in {
            "query": (B, num_tokens, H, 24),
            "keys": (B, 2 * num_columns, H, 24),
            "values": (B, num_columns, H, 24),
            "offset_bias": (B, num_tokens, H, NUM_OFFSETS),
            "place_bias": (B, num_tokens, H, P),
            "match_bias": (H, MOST_MATCHED + 1),
        }.items()
    }
    return entries, leaves


@pytest.mark.parametrize("is_bounded", [False, True])
@pytest.mark.parametrize("num_before", [0, 50])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("backend", CANDIDATES)
def test_positions_that_keep_their_places(
    backend: str, dtype: torch.dtype, num_before: int, is_bounded: bool
) -> None:
    entries, leaves = draw_runs(dtype, num_before)
    if is_bounded:
        draw_boundary(leaves)
    columns = entries.rows >> 1
    both = (columns[:, 1:] == columns[:, :-1]) & (entries.rows[:, 1:] != entries.rows[:, :-1])
    assert both.any()  # the key of a column is another one at the next position

    def run(backend: str, **floats: Tensor) -> Outputs:
        context, weights = attend_entries(entries, **floats, backend=backend)
        return {"context": context, "weights": weights}

    compare_with_reference(OP, backend, run, leaves)


@pytest.mark.parametrize("backend", CANDIDATES)
def test_boundaries_at_the_edge_of_the_window(backend: str) -> None:
    """Places that leave the window one entry at a time, while neighbours still have them all."""
    entries, leaves = draw_runs(torch.float64, 50, window=60)
    draw_boundary(leaves)
    columns = entries.rows.view(*entries.rows.shape[:2], P, NUM_OFFSETS) >> 1
    has_place, has_last = columns[..., BEFORE] >= 0, columns[..., -1] >= 0
    assert (~has_place & has_last).any()

    def run(backend: str, **floats: Tensor) -> Outputs:
        context, weights = attend_entries(entries, **floats, backend=backend)
        return {"context": context, "weights": weights}

    compare_with_reference(OP, backend, run, leaves)


@pytest.mark.parametrize("backend", CANDIDATES)
def test_threads_do_not_change_what_is_read(backend: str) -> None:
    entries, leaves = draw_runs(torch.float32, 50)
    draw_boundary(leaves)
    found, num_threads = [], torch.get_num_threads()
    leaves = {name: leaf.repeat(4, *[1] * (leaf.dim() - 1)) for name, leaf in leaves.items()}
    leaves |= {name: leaves[name][:H] for name in ("match_bias", "boundary")}
    entries = Entries(*(part.repeat(4, 1, 1) for part in entries))
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            floats = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
            results = attend_entries(entries, **floats, backend=backend)
            torch.autograd.backward(results, [result.detach().cos() for result in results])
            found.append([*results, *(leaf.grad for leaf in floats.values())])
    finally:
        torch.set_num_threads(num_threads)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


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
def test_boundaries_by_hand(backend: str) -> None:
    """A token whose value is 1 is a boundary of ln(1 + exp 2) if the value before it is 1 too."""
    text = torch.zeros(1, 120, dtype=torch.int64)
    entries = find_entries(text, torch.tensor([[[60]]], dtype=torch.int32), window=200)
    marks = torch.zeros(120, dtype=torch.float64)
    marks[[49, 50, 65, 70, 71]] = 1  # two of them are boundaries, around place 59
    leaves = {
        "query": torch.zeros(1, 1, 1, 1),
        "keys": torch.zeros(1, 240, 1, 1),
        "values": marks.view(1, 120, 1, 1),
        "offset_bias": torch.zeros(1, 1, 1, NUM_OFFSETS),
        "place_bias": torch.zeros(1, 1, 1, 1),
        "match_bias": torch.zeros(1, MOST_MATCHED + 1),
        "boundary": torch.tensor([[1000.0, 1000.0, -1998.0]]),
    }
    leaves = {name: leaf.double() for name, leaf in leaves.items()}
    _, weights = attend_entries(entries, **leaves, backend=backend)
    columns = entries.rows[0, 0].long() // 2
    lost = math.log1p(math.exp(2)) * ((columns >= 71) | (columns < 50)).double()
    expected = (-lost).exp() / (1 + (-lost).exp().sum())
    torch.testing.assert_close(weights[0, 0, 0], expected)


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


def draw_targets() -> tuple[Tensor, Tensor, Tensor]:
    """Return ids of two other components and of 20 entries, and targets, -100 for some."""
    generator = torch.Generator().manual_seed(6)
    other_ids = torch.randint(0, 4, (B, T, 2), generator=generator)
    token_ids = torch.randint(0, 4, (B, T, 20), generator=generator)
    targets = torch.randint(0, 4, (B, T), generator=generator)
    targets[:, 3], targets[1, 4] = -100, 7
    return other_ids, token_ids, targets


@pytest.mark.parametrize("backend", ALL)
def test_shares_of_targets_are_sums_of_all_shares(backend: str) -> None:
    leaves, (*ids, targets) = draw_shares(torch.float64), draw_targets()
    leaves["scores"][:, ::2, 1] = -torch.inf
    found = share_targets(*leaves.values(), *ids, targets, backend=backend)
    shares = share_heads(**leaves, backend=backend).exp()
    is_target = torch.cat(ids, dim=-1) == targets.unsqueeze(-1)
    expected = torch.stack([shares[..., 0], (shares[..., 1:] * is_target).sum(dim=-1)], dim=-1)
    torch.testing.assert_close(found.exp(), expected)
    assert found[1, 4, 1] == found[0, 3, 1] == -torch.inf
    with pytest.raises(InputError, match="other_ids"):
        share_targets(*leaves.values(), ids[0][..., 1:], ids[1], targets)
    with pytest.raises(InputError, match="targets has dtype"):
        share_targets(*leaves.values(), *ids, targets.int())


@pytest.mark.parametrize("num_entries", [20, 35])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", CANDIDATES)
def test_shares_of_targets_are_those_of_the_reference(
    backend: str, dtype: torch.dtype, num_entries: int
) -> None:
    leaves, (other_ids, token_ids, targets) = draw_shares(dtype), draw_targets()
    leaves["scores"][:, :, 1] = -torch.inf
    token_ids = token_ids.repeat(1, 1, 2)[..., :num_entries]
    leaves["weights"] = leaves["weights"].repeat(1, 1, 1, 2)[..., :num_entries] / 2
    exists = leaves["weights"] > 0

    def run(backend: str, weights: Tensor, **given: Tensor) -> Outputs:
        tokens = (other_ids, token_ids, targets)
        shares = share_targets(*given.values(), weights * exists, *tokens, backend=backend)
        return {"shares": shares.clamp_min(-1e3), "none": shares.isneginf()}

    compare_with_reference(OP, backend, run, leaves)


@pytest.mark.parametrize("chooses", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", CANDIDATES)
def test_sums_around_tokens_are_those_of_the_reference(
    backend: str, dtype: torch.dtype, chooses: bool
) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    for num_columns, width in ((1, 3), (11, 16), (30, 20), (150, 32)):
        rows = None
        if chooses:
            rows = torch.randperm(4 * num_columns, generator=generator)[: 2 * num_columns]

        def run(backend: str, features: Tensor, kernels: Tensor, rows=rows) -> Outputs:
            return {"sums": sum_around(features, kernels, rows, backend=backend)}

        leaves = {"features": draw(2, num_columns, width), "kernels": draw(2, width, REACH)}
        compare_with_reference(OP, backend, run, leaves)


@pytest.mark.parametrize("backend", ALL)
def test_sums_around_tokens_by_hand(backend: str) -> None:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(2, 40, 3, generator=generator, dtype=torch.float64)
    kernels = torch.randn(2, 3, REACH, generator=generator, dtype=torch.float64)
    sums = sum_around(features, kernels, backend=backend).view(2, 40, 2, 3)
    for column in (0, 5, 20, 35, 39):
        before = features[1, max(0, column - REACH) : column]
        ahead = features[1, column : column + REACH]
        past = (before * kernels[0].T[REACH - len(before) :]).sum(dim=0)
        torch.testing.assert_close(sums[1, column, 0], past)
        whole = past + (ahead * kernels[1].T[: len(ahead)]).sum(dim=0)
        torch.testing.assert_close(sums[1, column, 1], whole)
    assert sum_around(features, kernels, torch.arange(0), backend=backend).shape == (0, 3)
    with pytest.raises(InputError, match="kernels"):
        sum_around(features, kernels[..., 1:], backend=backend)
    with pytest.raises(InputError, match="rows has dtype"):
        sum_around(features, kernels, torch.zeros(2, dtype=torch.int32), backend=backend)
