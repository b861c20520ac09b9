"""Slot decisions (E7, order of E6) against an independent count in plain Python.

Token ids name the entries: token t of a row has id t, the initial slot m has id 100 + m.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.oracle import list_backends
from unimatrix.ops.cosine_read import DECISION_EPSILON
from unimatrix.ops.slots import SlotRead, SlotState, scan_slots

ALL = list_backends("slots")
pytestmark = pytest.mark.usefixtures("one_thread")

CODEBOOK = [
    [1.0, 0.0, 0.0],
    [0.9, math.sqrt(1 - 0.9**2), 0.0],  # matches the first
    [0.8, 0.0, math.sqrt(1 - 0.8**2)],  # does not
    [-1.3, 0.31, -0.22],
    [0.17, -0.71, 0.53],
    [0.11, 2.3, 1.7],
    [0.0, 0.0, 0.0],
]
STRENGTHS = [0.0, 0.04, 0.05, 0.0501, 0.31, 0.73, 1.0]


@dataclass
class Row:
    """One row of a drawn example; vectors as indices into the codebook."""

    queries: list[int]
    keys: list[int]
    strengths: list[float]
    writable: list[bool]
    length: int
    slots: list[tuple[int, float, int]]  # key, strength, age


def cosine(left: int, right: int) -> float:
    a, b = CODEBOOK[left], CODEBOOK[right]
    norms = max(math.hypot(*a), 1e-12) * max(math.hypot(*b), 1e-12)
    return math.fsum(x * y for x, y in zip(a, b, strict=True)) / norms


def rank(query: int, key: int, strength: float) -> float:
    """Return E6, rounded so that equal terms compare equal."""
    return round(cosine(query, key) / math.sqrt(3) + math.log(max(strength, 1e-4)), 9)


def allocate_by_hand(
    row: Row, num_chosen: int, match_threshold: float
) -> tuple[list[list[int]], list[int], list[int]]:
    """Return the ids each position reads, the final id of each slot and its age."""
    keys = [key for key, _, _ in row.slots]
    strengths = [strength for _, strength, _ in row.slots]
    ages = [age for _, _, age in row.slots]
    ids = [100 + m for m in range(len(row.slots))]
    reads: list[list[int]] = []
    for t, query in enumerate(row.queries):
        if t >= row.length:
            reads.append([])
            continue
        filled = [m for m in range(len(ids)) if strengths[m] > 0.05]
        best = sorted(filled, key=lambda m: (-rank(query, keys[m], strengths[m]), m))
        reads.append([ids[m] for m in best[:num_chosen]])
        if not row.writable[t]:
            continue
        for m in filled:
            ages[m] += 1
        closest = sorted(filled, key=lambda m: (-round(cosine(row.keys[t], keys[m]), 9), m))
        if closest and cosine(row.keys[t], keys[closest[0]]) > match_threshold:
            slot = closest[0]
        elif len(filled) < len(ids):
            slot = min(m for m in range(len(ids)) if m not in filled)
        else:
            slot = ages.index(max(ages))
        keys[slot], strengths[slot], ages[slot], ids[slot] = row.keys[t], row.strengths[t], 0, t
    return reads, ids, ages


@st.composite
def draw_rows(draw: st.DrawFn) -> list[Row]:
    num_tokens = draw(st.integers(1, 24))
    num_slots = draw(st.integers(1, 5))
    is_initial = draw(st.booleans())
    vector = st.integers(0, len(CODEBOOK) - 1)
    strength = st.sampled_from(STRENGTHS)

    def draw_list(element: st.SearchStrategy, size: int = num_tokens) -> list:
        return draw(st.lists(element, min_size=size, max_size=size))

    rows = []
    for _ in range(draw(st.integers(1, 2))):
        slots = [(6, 0.0, 0)] * num_slots
        if is_initial:
            slots = draw_list(st.tuples(vector, strength, st.integers(0, 3)), num_slots)
        length = draw(st.one_of(st.just(num_tokens), st.integers(0, num_tokens)))
        rows.append(
            Row(
                draw_list(vector),
                draw_list(vector),
                draw_list(strength),
                draw_list(st.sampled_from([True, True, True, False])),
                length,
                slots,
            )
        )
    return rows


def build_tensors(rows: Sequence[Row]) -> dict[str, Tensor]:
    """Return the operator's arguments for drawn rows."""
    codebook = torch.tensor(CODEBOOK, dtype=torch.float64)
    num_tokens, num_slots = len(rows[0].queries), len(rows[0].slots)
    slot_keys, slot_strength, slot_age = (
        [[slot[i] for slot in row.slots] for row in rows] for i in range(3)
    )
    return {
        "queries": codebook[torch.tensor([row.queries for row in rows])],
        "keys": codebook[torch.tensor([row.keys for row in rows])],
        "values": torch.ones(len(rows), num_tokens, 1, dtype=torch.float64),
        "strengths": torch.tensor([row.strengths for row in rows], dtype=torch.float64),
        "token_ids": torch.arange(num_tokens).repeat(len(rows), 1),
        "writable": torch.tensor([row.writable for row in rows]),
        "lengths": torch.tensor([row.length for row in rows]),
        "slot_keys": codebook[torch.tensor(slot_keys)],
        "slot_values": torch.ones(len(rows), num_slots, 1, dtype=torch.float64),
        "slot_strength": torch.tensor(slot_strength, dtype=torch.float64),
        "slot_age": torch.tensor(slot_age),
        "slot_token_ids": torch.arange(100, 100 + num_slots).repeat(len(rows), 1),
    }


def scan(backend: str, tensors: dict[str, Tensor], **options: float) -> tuple[SlotRead, SlotState]:
    tokens = {name: value for name, value in tensors.items() if name not in SlotState._fields}
    initial = SlotState(**{name: tensors[name] for name in SlotState._fields})
    return scan_slots(**tokens, initial=initial, backend=backend, **options)


def test_codebook_separates_scores() -> None:
    """Apart from exact ties, what the drawn decisions compare differs by far more than epsilon."""
    vectors = range(len(CODEBOOK))
    strengths = [strength for strength in STRENGTHS if strength > 0.05]
    for query in vectors:
        ranks = sorted({rank(query, key, s) for key in vectors for s in strengths})
        gaps = [math.sqrt(3) * (high - low) for low, high in itertools.pairwise(ranks)]
        assert min(gaps) > 10 * DECISION_EPSILON
        for key in vectors:
            assert all(abs(cosine(query, key) - limit) > 0.001 for limit in (0.85, 0.95))


@settings(max_examples=80)
@given(
    rows=draw_rows(),
    slots_per_read=st.integers(1, 7),
    match_threshold=st.sampled_from([0.85, 0.95, 2.0, -2.0]),
)
def test_decisions_equal_those_by_hand(
    rows: list[Row], slots_per_read: int, match_threshold: float
) -> None:
    tensors = build_tensors(rows)
    num_chosen = min(slots_per_read, len(rows[0].slots))
    for backend in ALL:
        read, final = scan(
            backend, tensors, slots_per_read=slots_per_read, match_threshold=match_threshold
        )
        for b, row in enumerate(rows):
            reads, ids, ages = allocate_by_hand(row, num_chosen, match_threshold)
            for t, expected in enumerate(reads):
                weights = read.pointer_weights[b, t]
                assert (weights > 0).sum() == len(expected), (backend, t)
                padded = expected + [0] * (num_chosen - len(expected))
                assert read.pointer_token_ids[b, t].tolist() == padded, (backend, t)
                assert read.context[b, t].item() == pytest.approx(float(bool(expected)))
            assert final.slot_token_ids[b].tolist() == ids, backend
            assert final.slot_age[b].tolist() == ages, backend


@settings(max_examples=40)
@given(rows=draw_rows(), data=st.data())
def test_any_split_equals_one_pass(rows: list[Row], data: st.DataObject) -> None:
    tensors = build_tensors(rows)
    num_tokens = len(rows[0].queries)
    cuts = sorted(
        data.draw(st.sets(st.integers(1, num_tokens - 1)) if num_tokens > 1 else st.just(set()))
    )
    for backend in ALL:
        whole, expected = scan(backend, tensors, slots_per_read=3)
        parts, carried = [], dict(tensors)
        for start, stop in itertools.pairwise([0, *cuts, num_tokens]):
            part = carried | {
                name: tensors[name][:, start:stop]
                for name in ("queries", "keys", "values", "strengths", "token_ids", "writable")
            }
            part["lengths"] = (tensors["lengths"] - start).clamp(0, stop - start)
            read, final = scan(backend, part, slots_per_read=3)
            parts.append(read)
            carried |= final._asdict()
        joined = SlotRead(*(torch.cat(field, dim=1) for field in zip(*parts, strict=True)))
        assert torch.equal(joined.pointer_token_ids, whole.pointer_token_ids), backend
        torch.testing.assert_close(joined.pointer_weights, whole.pointer_weights)
        torch.testing.assert_close(joined.context, whole.context)
        for name in SlotState._fields:
            assert torch.equal(carried[name], getattr(expected, name)), (backend, name)
