"""Selective slots: the compiled scan against the loop, and the laws of the policy."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unimatrix.errors import InputError
from unimatrix.ops import selective_slots
from unimatrix.ops.selective_slots import (
    MAX_CODE,
    MIN_CODE,
    SelectiveSlots,
    choose_backend,
    empty_selective_slots,
    encode_strengths,
    hash_contexts,
    scan_selective_slots,
)

OPTIONS = [
    {},
    {"bounded": False},
    {"margin": 0},
    {"keep_first": True},
    {"fade_tokens": 3},
    {"fade_tokens": 2, "bounded": False, "margin": 2},
    {"keep_first": True, "fade_tokens": 4, "margin": 1},
]


def draw(batch, num_tokens, seed, *, patterns=((0,), (0, 1)), alphabet=5, spread=20):
    """Return read keys, write keys, ids and codes of random streams with many repeats."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, alphabet, (batch, num_tokens), generator=generator)
    keys = hash_contexts(ids, patterns)
    before = torch.cat([torch.full_like(keys[:, :1], -1), keys[:, :-1]], dim=1)
    codes = torch.randint(-spread, spread, before.shape, generator=generator)
    return torch.cat([keys, before[..., :1]], dim=-1), before, ids, codes


def assert_same(left, right):
    """Assert that two scans are equal, field by field."""
    for a, b in zip(left.lookup, right.lookup, strict=True):
        assert torch.equal(a, b)
    assert (left.slots is None) == (right.slots is None)
    if left.slots is not None:
        for a, b in zip(left.slots, right.slots, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)
        assert torch.equal(left.writers, right.writers)


@pytest.mark.parametrize("num_tokens", [1, 2, 63, 64, 65, 100])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_native_is_the_reference(num_tokens: int, options: dict) -> None:
    inputs = draw(3, num_tokens, seed=num_tokens)
    lengths = torch.tensor([num_tokens, num_tokens // 2, 0])
    first = torch.tensor([0, 5, 11])
    scans = [
        scan_selective_slots(
            *inputs,
            initial=empty_selective_slots(3, 4, 100),
            first_position=first,
            lengths=lengths,
            backend=backend,
            **options,
        )
        for backend in ("reference", "native")
    ]
    assert_same(*scans)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    num_slots=st.integers(1, 6),
    options=st.sampled_from(OPTIONS),
    spread=st.sampled_from([1, 3, 100]),
)
def test_native_is_the_reference_on_ties_and_evictions(seed, num_slots, options, spread) -> None:
    inputs = draw(2, 30, seed, spread=spread)
    initial = empty_selective_slots(2, num_slots, 100)
    assert_same(
        *(
            scan_selective_slots(*inputs, initial=initial, backend=backend, **options)
            for backend in ("reference", "native")
        )
    )


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("options", [o for o in OPTIONS if "bounded" not in o], ids=str)
def test_any_split_finds_the_same(backend: str, options: dict) -> None:
    inputs = draw(2, 40, seed=1)
    whole = scan_selective_slots(
        *inputs, initial=empty_selective_slots(2, 4, 100), backend=backend, **options
    )
    for cuts in ((7,), (1, 2, 3, 20), range(1, 40)):
        bounds = [0, *cuts, 40]
        slots, parts = empty_selective_slots(2, 4, 100), []
        for start, stop in itertools.pairwise(bounds):
            lookup, slots, _ = scan_selective_slots(
                *(x[:, start:stop] for x in inputs),
                initial=slots,
                first_position=torch.tensor([start, start]),
                backend=backend,
                **options,
            )
            parts.append(lookup)
        for name in ("codes", "value_ids"):
            found = torch.cat([getattr(part, name) for part in parts], dim=1)
            assert torch.equal(found, getattr(whole.lookup, name)), name
        for a, b in zip(slots, whole.slots, strict=True):
            assert torch.equal(a, b)


def test_enough_slots_are_no_bound() -> None:
    inputs = draw(2, 50, seed=3)
    bounded = scan_selective_slots(*inputs, initial=empty_selective_slots(2, 64, 100))
    unbounded = scan_selective_slots(
        *inputs, initial=empty_selective_slots(2, 64, 100), bounded=False
    )
    for a, b in zip(bounded.lookup, unbounded.lookup, strict=True):
        assert torch.equal(a, b)


def offer(slots: SelectiveSlots, key: int, value: int, code: int, **options) -> SelectiveSlots:
    """Return the slots after one write."""
    scan = scan_selective_slots(
        torch.full((1, 1, 1), -1),
        torch.tensor([[[key]]]),
        torch.tensor([[value]]),
        torch.tensor([[[code]]]),
        initial=slots,
        **options,
    )
    assert scan.slots is not None
    return scan.slots


def held(slots: SelectiveSlots) -> dict[int, tuple[int, int]]:
    """Return what row 0 holds: key to (value, code)."""
    rows = zip(*(field[0].tolist() for field in slots), strict=True)
    return {key: (value, code) for key, value, code in rows if value >= 0}


def test_a_weaker_write_is_refused_and_a_stronger_one_displaces_the_weakest() -> None:
    slots = empty_selective_slots(1, 2, 100)
    for key, code in ((1, 30), (2, 10)):
        slots = offer(slots, key, key + 50, code)
    assert held(offer(slots, 3, 53, 18)) == {1: (51, 30), 2: (52, 10)}  # within the margin
    assert held(offer(slots, 3, 53, 19)) == {1: (51, 30), 3: (53, 19)}
    assert held(offer(slots, 3, 53, 11, margin=0)) == {1: (51, 30), 3: (53, 11)}


def test_among_equals_the_earlier_stays() -> None:
    slots = empty_selective_slots(1, 2, 100)
    for key in range(1, 6):
        slots = offer(slots, key, key, 40, margin=0)
    assert held(slots) == {1: (1, 40), 2: (2, 40)}


def test_a_context_met_again_takes_the_last_value_or_keeps_the_first() -> None:
    slots = offer(empty_selective_slots(1, 2, 100), 1, 51, 20)
    assert held(offer(slots, 1, 52, 12)) == {1: (52, 12)}
    assert held(offer(slots, 1, 52, 11)) == {1: (51, 20)}
    assert held(offer(slots, 1, 52, 28, keep_first=True)) == {1: (51, 20)}
    assert held(offer(slots, 1, 52, 29, keep_first=True)) == {1: (52, 29)}


def test_fading_frees_frozen_slots() -> None:
    slots = offer(empty_selective_slots(1, 1, 100), 1, 51, MAX_CODE)
    assert held(offer(slots, 2, 52, 100, margin=0)) == {1: (51, MAX_CODE)}
    for position in range(1, 30):
        slots = offer(slots, -1, 0, 0, fade_tokens=1, first_position=torch.tensor([position]))
    assert held(slots) == {1: (51, MAX_CODE - 29)}
    assert held(offer(slots, 2, 52, 100, margin=0)) == {2: (52, 100)}


def test_a_position_does_not_see_its_own_write() -> None:
    lookup, _, _ = scan_selective_slots(
        torch.tensor([[[7], [7]]]),
        torch.tensor([[[7], [-1]]]),
        torch.tensor([[9, 9]]),
        torch.zeros((1, 2, 1), dtype=torch.int64),
        initial=empty_selective_slots(1, 2, 100),
    )
    assert lookup.entries.tolist() == [[[-1], [2]]]
    assert lookup.value_ids.tolist() == [[[0], [9]]]


@pytest.mark.parametrize("compiles", [False, True])
def test_auto_on_a_gpu(compiles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selective_slots.scan, "compiles_triton", lambda device: compiles)
    cuda = torch.device("cuda")
    assert choose_backend(cuda, 4096) == ("triton" if compiles else "native")
    assert choose_backend(cuda, 4097) == "native"
    assert choose_backend(cuda, 8, bounded=False) == "native"


def test_auto_is_native_on_the_cpu() -> None:
    assert choose_backend(torch.device("cpu"), 8) == "native"


def test_a_slot_is_a_few_bytes() -> None:
    slots = empty_selective_slots(1, 256, 8192)
    assert sum(x.numel() * x.element_size() for x in slots) == 256 * 7
    assert empty_selective_slots(1, 1, 50_000).slot_value_ids.dtype == torch.int32


def test_contexts() -> None:
    ids = torch.tensor([[3, 1, 3, 1, 3]])
    assert torch.equal(hash_contexts(ids, [[0]])[..., 0], ids)
    keys = hash_contexts(ids, [[0], [0, 1], [0, 2]])
    assert (keys[0, 0] >= 0).tolist() == [True, False, False]
    assert (keys[0, 1] >= 0).tolist() == [True, True, False]
    assert torch.equal(keys[0, 2, 1], keys[0, 4, 1])
    assert keys[0, 3, 1] != keys[0, 4, 1]
    assert len({int(key) for key in keys[0, 4]}) == 3  # the pattern is part of the key
    assert int(keys.max()) < 2**31
    assert hash_contexts(ids[:, :1], [[0, 9]]).tolist() == [[[-1]]]


def test_hashes_do_not_collide_by_chance() -> None:
    ids = torch.arange(100_000).unsqueeze(0)
    keys = hash_contexts(ids, [[0, 1]])[0, 1:, 0]
    assert len(keys.unique()) >= len(keys) - 12  # 2.3 pairs expected in 2^31


def test_bad_input_is_named() -> None:
    read, write, ids, codes = draw(1, 4, seed=0)
    initial = empty_selective_slots(1, 2, 100)
    with pytest.raises(InputError, match="codes holds 300"):
        scan_selective_slots(read, write, ids, codes * 0 + 300, initial=initial)
    with pytest.raises(InputError, match=f"codes holds {MIN_CODE - 1}"):
        scan_selective_slots(read, write, ids, codes * 0 + MIN_CODE - 1, initial=initial)
    with pytest.raises(InputError, match="value_ids"):
        scan_selective_slots(read, write, ids[:, :2], codes, initial=initial)
    with pytest.raises(InputError, match="parallel"):
        scan_selective_slots(read, write, ids, codes, initial=initial, backend="parallel")


@pytest.mark.parametrize("patterns", [[[0]], [[0, 1, 2, 3]], [[0], [0, 2], [1]], [[0, 9]]])
def test_compiled_contexts_are_those_of_tensor_operations(patterns) -> None:
    ids = torch.randint(-1, 9, (3, 200), generator=torch.Generator().manual_seed(0))
    expected = hash_contexts(ids, patterns, backend="reference")
    for backend in ("auto", "native", "triton"):
        assert torch.equal(hash_contexts(ids, patterns, backend=backend), expected)
    few = hash_contexts(ids[:, :5], patterns, backend="native")
    assert torch.equal(few, expected[:, :5])


def test_contexts_of_an_unknown_back_end() -> None:
    with pytest.raises(InputError, match="'parallel' is not available for selective_slots"):
        hash_contexts(torch.zeros(1, 3, dtype=torch.int64), [[0]], backend="parallel")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_codes_are_rounded_to_even_and_cut_to_what_a_byte_holds(dtype: torch.dtype) -> None:
    logits = torch.tensor([3 / 16, 5 / 16, 100.0, -100.0, 15.9], dtype=dtype, requires_grad=True)
    codes = encode_strengths(logits)
    assert (codes.dtype, codes.requires_grad) == (torch.int64, False)
    assert codes.tolist() == [2, 2, 127, -128, 127]
    drawn = 4 * torch.randn(2, 30, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(encode_strengths(drawn), (8 * drawn).round().clamp(-128, 127).long())
