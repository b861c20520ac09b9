"""Suffix automaton (E10): exact and latest, resumable, bounded, never worse than n log n."""

import itertools
import math
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

from tests.ops.oracle import Outputs, candidates, compare_with_reference
from unimatrix.errors import InputError
from unimatrix.ops.backends import BACKENDS
from unimatrix.ops.suffix_automaton import (
    AutomatonState,
    SuffixPrediction,
    SuffixState,
    count_live_bytes,
    native,
    predict_from_suffix,
)
from unimatrix.ops.suffix_automaton.storage import NUM_HELD, NUM_TOKENS, NUM_VISITS
from unimatrix.ops.text_index import state as text_index

ALL = BACKENDS["suffix_automaton"]
CANDIDATES = candidates("suffix_automaton")
SPLAY_LENGTHS = (0, 1, 3, 1000)  # from "every node is long" to "none is"


def use_splay_length(length: int) -> "mock._patch[int]":
    """Move the length from which nodes are long, so that short texts reach them too."""
    return mock.patch.object(native, "SPLAY_LENGTH", length)


def predict_by_slices(ids: list[int], window: int | None) -> tuple[list[int], list[int]]:
    """Follow E10 to the letter: every m from the longest, every j from the latest."""
    predicted, lengths = [], []
    for t in range(len(ids)):
        most = t + 1 if window is None else min(64, max(1, window // 2))
        first = 0 if window is None else max(0, t - (window - most))
        matches = (
            (m + 1, ids[j + 1])
            for m in range(min(t, most - 1), -1, -1)
            for j in range(t - 1, max(m, first) - 1, -1)
            if ids[j - m : j + 1] == ids[t - m : t + 1]
        )
        length, token = next(matches, (0, -1))
        predicted.append(token)
        lengths.append(length)
    return predicted, lengths


def predict_in_pieces(
    ids: Tensor, sizes: list[int], lengths: Tensor, window: int | None, in_place: bool
) -> tuple[SuffixPrediction, SuffixState]:
    """Predict piece by piece, the sizes taken in turn, through what is carried."""
    automaton, pieces, first = None, [], 0
    for size in itertools.cycle(sizes):
        piece = ids[:, first : first + size]
        prediction, automaton = predict_from_suffix(
            piece,
            lengths=(lengths - first).clamp(0, piece.shape[1]),
            initial=automaton,
            window=window,
            in_place=in_place,
        )
        pieces.append(prediction)
        first += size
        if first >= ids.shape[1]:
            break
    joined = (torch.cat(parts, dim=1) for parts in zip(*pieces, strict=True))
    return SuffixPrediction(*joined), automaton


def repeat_fibonacci(num_tokens: int) -> list[int]:
    a, b = [1], [1, 0]
    while len(b) < num_tokens:
        a, b = b, b + a
    return b[:num_tokens]


def list_de_bruijn(num_tokens: int) -> list[int]:
    """Greedy (prefer-one) de Bruijn sequence over two symbols, at least that long."""
    order = max(1, math.ceil(math.log2(num_tokens)))
    ids, seen = [0] * order, {(0,) * order}
    while len(ids) < num_tokens:
        word = tuple(ids[len(ids) - order + 1 :]) if order > 1 else ()
        ids.append(1 if (*word, 1) not in seen else 0)
        seen.add((*word, ids[-1]))
    return ids[:num_tokens]


def raise_runs(num_tokens: int) -> list[int]:
    """Ever longer runs, each ended by another symbol: a chain that is walked again and again."""
    ids: list[int] = []
    for length in itertools.count(1):
        ids += [0] * length + [1]
        if len(ids) >= num_tokens:
            break
    return ids[:num_tokens]


def draw_random(num_symbols: int, num_tokens: int) -> list[int]:
    generator = torch.Generator().manual_seed(num_symbols + num_tokens)
    return torch.randint(0, num_symbols, (num_tokens,), generator=generator).tolist()


def spoil_period(period: int, num_tokens: int) -> list[int]:
    """A period with a symbol of its own, the same or another, at every 61st place."""
    return [
        period + i // 61 % 3 if i % 61 == 60 else (i - i // 61) % period for i in range(num_tokens)
    ]


TEXTS: dict[str, Callable[[int], list[int]]] = {
    "run": lambda n: [5] * n,
    "run, break, run": lambda n: [0] * (n // 2) + [1] + [0] * (n - n // 2 - 1),
    "rising runs": raise_runs,
    "period 2": lambda n: [i % 2 for i in range(n)],
    "period 7": lambda n: [i % 7 for i in range(n)],
    "spoiled period 7": lambda n: spoil_period(7, n),
    "Fibonacci": repeat_fibonacci,
    "de Bruijn": list_de_bruijn,
    "all different": lambda n: [7 * i for i in range(n)],
    "random 2": lambda n: draw_random(2, n),
    "random 8192": lambda n: draw_random(8192, n),
}


def compare(backend: str, ids: Tensor, lengths: Tensor | None, window: int | None) -> None:
    def run(backend: str, ids: Tensor, lengths: Tensor | None) -> Outputs:
        prediction, automaton = predict_from_suffix(
            ids, lengths=lengths, window=window, backend=backend
        )
        counts = automaton.counters[:, [NUM_TOKENS, NUM_HELD]]
        held = torch.arange(automaton.tokens.shape[1]) < counts[:, 1:]
        text = automaton.tokens.where(held, -1)[:, : int(counts[:, 1].max())]
        return {**prediction._asdict(), "counts": counts, "text": text}

    compare_with_reference("suffix_automaton", backend, run, {"ids": ids, "lengths": lengths})


@pytest.mark.parametrize("backend", ALL)
def test_abracadabra(backend: str) -> None:
    ids = torch.tensor([list(b"abracadabra")])
    prediction, _ = predict_from_suffix(ids, backend=backend)
    shown = "".join("-" if token < 0 else chr(token) for token in prediction.predicted_ids[0])
    assert shown == "---b-c-drac"
    assert prediction.match_lengths.tolist() == [[0, 0, 0, 1, 0, 1, 0, 1, 2, 3, 4]]


@pytest.mark.parametrize("backend", ALL)
def test_latest_occurrence_wins(backend: str) -> None:
    ids = torch.tensor([[1, 2, 9, 1, 3, 9, 1, 4, 9, 1]])
    prediction, _ = predict_from_suffix(ids, backend=backend)
    assert prediction.predicted_ids[0, [3, 6, 9]].tolist() == [2, 3, 4]
    assert prediction.match_lengths[0, [3, 6, 9]].tolist() == [1, 2, 2]


@given(
    ids=st.lists(st.integers(0, 2), min_size=1, max_size=24),
    window=st.none() | st.integers(1, 9),
    cut=st.integers(0, 24),
)
@settings(max_examples=150)
def test_reference_is_the_definition(ids: list[int], window: int | None, cut: int) -> None:
    predicted, lengths = predict_by_slices(ids, window)
    first = ids[: max(1, cut)]
    pieces = [first, ids[len(first) :]] if len(first) < len(ids) else [ids]
    automaton, found = None, []
    for piece in pieces:
        prediction, automaton = predict_from_suffix(
            torch.tensor([piece]), initial=automaton, window=window, backend="reference"
        )
        found.append(prediction)
    assert torch.cat([part.predicted_ids for part in found], 1).tolist() == [predicted]
    assert torch.cat([part.match_lengths for part in found], 1).tolist() == [lengths]


@pytest.mark.parametrize("window", [None, 1, 33, 150])
@pytest.mark.parametrize("num_tokens", [1, 2, 63, 64, 65, 100])
@pytest.mark.parametrize("backend", CANDIDATES)
def test_meets_reference(backend: str, num_tokens: int, window: int | None) -> None:
    ids = torch.tensor([text(num_tokens) for text in TEXTS.values()])
    some = torch.arange(len(ids)) * num_tokens // len(ids)
    for lengths, splay_length in ((None, 0), (None, native.SPLAY_LENGTH), (some, 3)):
        with use_splay_length(splay_length):
            compare(backend, ids, lengths, window)


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("backend", CANDIDATES)
def test_meets_reference_on_hundreds_of_tokens(backend: str, name: str) -> None:
    for splay_length, window in ((0, None), (native.SPLAY_LENGTH, 128)):
        with use_splay_length(splay_length):
            compare(backend, torch.tensor([TEXTS[name](400)]), None, window)


@pytest.mark.slow
@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("backend", CANDIDATES)
def test_meets_reference_on_thousands_of_tokens(backend: str, name: str) -> None:
    for splay_length, window in ((0, None), (native.SPLAY_LENGTH, None), (2, 600)):
        with use_splay_length(splay_length):
            compare(backend, torch.tensor([TEXTS[name](4000)]), None, window)


@st.composite
def draw_batches(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Rows of pieces over few symbols, half of them repeats of what the row has, and lengths."""
    num_symbols = draw(st.integers(1, 3))
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        row = draw(st.lists(st.integers(0, num_symbols - 1), min_size=1, max_size=20))
        for _ in range(draw(st.integers(0, 5))):
            first = draw(st.integers(0, len(row) - 1))
            size = draw(st.integers(1, 30))
            row += [row[first + i % (len(row) - first)] for i in range(size)]
            row += draw(st.lists(st.integers(0, num_symbols), max_size=3))
        rows.append(row)
    longest = max(map(len, rows))
    ids = torch.tensor([row + [-100] * (longest - len(row)) for row in rows])
    return ids, torch.tensor([draw(st.integers(0, len(row))) for row in rows])


@given(
    batch=draw_batches(),
    window=st.none() | st.integers(1, 40),
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=6),
    in_place=st.booleans(),
    splay_length=st.sampled_from(SPLAY_LENGTHS),
)
@example((torch.tensor([[0] * 9 + [1] + [0] * 9]), torch.tensor([19])), 4, [1], True, 0)
@settings(max_examples=120)
def test_any_split_meets_reference(
    batch: tuple[Tensor, Tensor],
    window: int | None,
    sizes: list[int],
    in_place: bool,
    splay_length: int,
) -> None:
    ids, lengths = batch
    expected, _ = predict_from_suffix(ids, lengths=lengths, window=window, backend="reference")
    with use_splay_length(splay_length):
        actual, automaton = predict_in_pieces(ids, sizes, lengths, window, in_place)
    for name, value in expected._asdict().items():
        assert torch.equal(getattr(actual, name), value), name
    column = NUM_TOKENS if window is None else text_index.NUM_TOKENS
    assert automaton.counters[:, column].tolist() == lengths.tolist()


@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("order", list(itertools.product(ALL, ALL)), ids="-".join)
def test_backends_resume_each_other(order: tuple[str, str], window: int | None) -> None:
    ids = torch.tensor([raise_runs(90), draw_random(2, 90)])
    expected, _ = predict_from_suffix(ids, window=window, backend="reference")
    automaton, found = None, []
    for backend, piece in zip((*order, order[0]), ids.split(30, dim=1), strict=True):
        prediction, automaton = predict_from_suffix(
            piece, initial=automaton, window=window, backend=backend
        )
        found.append(prediction.predicted_ids)
    assert torch.equal(torch.cat(found, dim=1), expected.predicted_ids)


@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("backend", ALL)
def test_initial_is_left_as_it_was(backend: str, window: int | None) -> None:
    _, initial = predict_from_suffix(torch.tensor([draw_random(2, 50)]), window=window)
    before = [tensor.clone() for tensor in initial]
    ids = torch.tensor([draw_random(3, 40)])
    for _ in range(2):
        _, final = predict_from_suffix(ids, initial=initial, window=window, backend=backend)
    assert all(map(torch.equal, initial, before))
    pointers = [{t.data_ptr() for t in state if t.numel()} for state in (initial, final)]
    assert not pointers[0] & pointers[1]


def test_in_place_reuses_the_tensors() -> None:
    ids = torch.tensor([draw_random(2, 60)])
    expected, _ = predict_from_suffix(ids, window=64)
    _, automaton = predict_from_suffix(ids[:, :30], window=64)
    addresses = [tensor.data_ptr() for tensor in automaton]
    actual, final = predict_from_suffix(ids[:, 30:], initial=automaton, window=64, in_place=True)
    assert torch.equal(actual.predicted_ids, expected.predicted_ids[:, 30:])
    assert [tensor.data_ptr() for tensor in final] == addresses


@pytest.mark.parametrize("window", [None, 8])
def test_padding_changes_nothing(window: int | None) -> None:
    first = torch.tensor([draw_random(2, 50), draw_random(3, 50), draw_random(4, 50)])
    _, initial = predict_from_suffix(first, window=window)
    ids = torch.tensor([[0, 1, 0, 1], [-100] * 4, [2, -100, -100, -100]])
    lengths = torch.tensor([4, 0, 1])
    prediction, final = predict_from_suffix(ids, lengths=lengths, initial=initial, window=window)
    padded = torch.arange(4) >= lengths[:, None]
    assert (prediction.predicted_ids[padded] == -1).all()
    assert (prediction.match_lengths[padded] == 0).all()
    for name, before in initial._asdict().items():
        after = getattr(final, name)
        if name == "edges":  # a grown hash table holds the same entries elsewhere
            before, after = (edges[1][edges[1, :, 2] != 0] for edges in (before, after))
            assert sorted(before.tolist()) == sorted(after.tolist())
        else:
            assert torch.equal(after[1, : before.shape[1]], before[1])


@pytest.mark.parametrize("window", [None, 20])
def test_gathered_and_saved_rows_go_on(window: int | None) -> None:
    ids = torch.tensor([draw_random(2, 80), repeat_fibonacci(80), raise_runs(80)])
    rows = torch.tensor([2, 0, 2, 1])
    expected, _ = predict_from_suffix(ids[rows], window=window)
    _, automaton = predict_from_suffix(ids[:, :50], window=window)
    gathered = {name: t.index_select(0, rows) for name, t in automaton._asdict().items()}
    loaded = type(automaton)(**load(save(gathered)))
    actual, _ = predict_from_suffix(ids[rows, 50:], initial=loaded, window=window)
    assert torch.equal(actual.predicted_ids, expected.predicted_ids[:, 50:])
    assert torch.equal(actual.match_lengths, expected.match_lengths[:, 50:])


@pytest.mark.parametrize("backend", CANDIDATES)
def test_large_ids_and_many_children(backend: str) -> None:
    ids = torch.tensor([draw_random(8192, 150), [2**31 - 1 - i % 40 for i in range(150)]])
    many = torch.tensor([[0, i] for i in range(1, 76)]).flatten()
    many[100:] = many[:50]
    compare(backend, torch.cat([ids, many[None]]), None, None)


@pytest.mark.parametrize(("vocab_size", "of_token"), [(259, 2), (2**31, 4)])
def test_bytes_are_constant_with_a_window(vocab_size: int, of_token: int) -> None:
    def count(state: SuffixState) -> int:
        return sum(tensor.nbytes for tensor in state)

    automaton: SuffixState | None = None
    for name in ("random 2", "rising runs", "all different"):
        ids = torch.tensor([TEXTS[name](300)] * 2) % 259
        _, automaton = predict_from_suffix(ids, initial=automaton, window=32, vocab_size=vocab_size)
        assert automaton is not None
        # The text and the tree, its 256 roots, and what other indexes need.
        assert count(automaton) == 2 * ((of_token + 4) * 32 + 512 + 368)


@pytest.mark.parametrize("name", TEXTS)
def test_live_bytes_a_token(name: str) -> None:
    num_tokens = 3000
    _, automaton = predict_from_suffix(torch.tensor([TEXTS[name](num_tokens)]))
    allocated = sum(tensor.numel() * tensor.element_size() for tensor in automaton)
    assert int(count_live_bytes(automaton)) <= min(allocated, 46 * num_tokens)
    assert allocated <= 63 * num_tokens


def count_visits(name: str, num_tokens: int) -> int:
    _, automaton = predict_from_suffix(torch.tensor([TEXTS[name](num_tokens)]))
    return int(automaton.counters[0, NUM_VISITS])


@pytest.mark.parametrize("name", TEXTS)
def test_visits_are_log_linear(name: str) -> None:
    num_tokens = 20_000
    with use_splay_length(0):
        assert count_visits(name, num_tokens) <= 3 * num_tokens * math.log2(num_tokens)
    bound = num_tokens * (native.SPLAY_LENGTH + 2 * math.log2(num_tokens))
    assert count_visits(name, num_tokens) <= bound


def test_visits_without_splay_trees_are_not() -> None:
    num_tokens = 20_000
    with use_splay_length(num_tokens):
        assert count_visits("rising runs", num_tokens) > 6 * num_tokens * math.log2(num_tokens)


@pytest.mark.slow
@pytest.mark.parametrize("name", TEXTS)
def test_visits_are_log_linear_on_a_million_tokens(name: str) -> None:
    num_tokens = 1_000_000
    bound = num_tokens * (native.SPLAY_LENGTH + 2 * math.log2(num_tokens))
    assert count_visits(name, num_tokens) <= bound


def test_unusable_inputs_are_named() -> None:
    ids = torch.zeros(2, 3, dtype=torch.int64)
    _, automaton = predict_from_suffix(ids, window=4)
    _, unbounded = predict_from_suffix(ids)
    one_row = AutomatonState(*(tensor[:1] for tensor in unbounded))
    cases: list[tuple[Tensor, dict[str, object], str]] = [
        (ids[0], {}, "shape"),
        (ids[:, :0], {}, "shape"),
        (ids.float(), {}, "dtype"),
        (ids - 1, {}, "holds -1"),
        (ids + 2**31, {}, f"holds {2**31}"),
        (ids, {"lengths": torch.tensor([1])}, "lengths"),
        (ids, {"lengths": torch.tensor([1, 4])}, r"0 \.\. 3"),
        (ids, {"lengths": torch.tensor([1.0, 2.0])}, "dtype"),
        (ids, {"window": 0}, "window is 0"),
        (ids, {"initial": automaton}, "built with 4"),
        (ids, {"initial": automaton, "window": 5}, "window is 5 but .* built with 4"),
        (ids, {"initial": unbounded, "window": 4}, "window is 4 but .* built with None"),
        (ids, {"initial": one_row}, "1 rows"),
        (ids[:1], {"initial": automaton, "window": 4}, r"index\.tokens is torch\.int32 \[2, 4\]"),
        (ids, {"backend": "parallel"}, "parallel"),
    ]
    for bad_ids, options, message in cases:
        with pytest.raises(InputError, match=message):
            predict_from_suffix(bad_ids, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("num_tokens", [7, 16, 17, 60])
def test_an_automaton_that_is_not_kept_answers_the_same(num_tokens: int) -> None:
    ids = torch.randint(0, 3, (2, num_tokens), generator=torch.Generator().manual_seed(1))
    kept, automaton = predict_from_suffix(ids, window=8)
    passing, nothing = predict_from_suffix(ids, window=8, keeps_state=False)
    assert automaton is not None
    assert nothing is None
    for one, other in zip(kept, passing, strict=True):
        assert torch.equal(one, other)
