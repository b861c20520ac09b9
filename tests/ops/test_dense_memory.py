"""Dense associative memory: E5 score and softmax over the best K of all earlier pairs."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.oracle import Outputs, candidates, compare_with_reference
from unimatrix.errors import InputError
from unimatrix.ops.backends import BACKENDS
from unimatrix.ops.cosine_read import UNIT_GRID
from unimatrix.ops.dense_memory import DenseMemory, parallel, read_dense_memory
from unimatrix.ops.dense_memory.entries import choose_entries

ALL = BACKENDS["dense_memory"]
Leaves = dict[str, Tensor | None]
pytestmark = pytest.mark.usefixtures("one_thread")


def draw_leaves(
    num_tokens: int,
    dtype: torch.dtype,
    *,
    batch: int = 3,
    with_initial: bool = True,
    with_lengths: bool = True,
    seed: int = 0,
) -> Leaves:
    """Return inputs with repeated keys, positions that do not write, and a row without tokens."""
    generator = torch.Generator().manual_seed(seed + num_tokens)
    key_size, value_size, num_before = 8, 5, 4

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    def chance(probability: float, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator) < probability

    codebook = normal(12, key_size)
    keys = codebook[torch.randint(0, 12, (batch, num_tokens), generator=generator)]
    writable = chance(0.9, batch, num_tokens)
    writable[:, 0] = with_initial
    return {
        "queries": normal(batch, num_tokens, key_size),
        "keys": keys,
        "values": normal(batch, num_tokens, value_size),
        "writable": writable,
        "lengths": torch.tensor([num_tokens, 0, num_tokens // 2])[:batch] if with_lengths else None,
        "initial_keys": normal(batch, num_before, key_size) if with_initial else None,
        "initial_values": normal(batch, num_before, value_size) if with_initial else None,
        "initial_valid": chance(0.7, batch, num_before) if with_initial else None,
    }


def run(backend: str, *, topk: int = 8, chunk_size: int = 24, **leaves: Tensor | None) -> Outputs:
    """Run the operator on named leaves and name its outputs."""
    tensors = dict(leaves)
    before = [tensors.pop(f"initial_{name}") for name in DenseMemory._fields]
    context, final = read_dense_memory(
        **tensors,
        topk=topk,
        initial=None if before[0] is None else DenseMemory(*before),
        chunk_size=chunk_size,
        backend=backend,
    )
    return {"context": context} | final._asdict()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("num_tokens", [1, 2, 63, 64, 65, 100])
@pytest.mark.parametrize("backend", candidates("dense_memory"))
def test_backend_equals_reference(backend: str, num_tokens: int, dtype: torch.dtype) -> None:
    compare_with_reference("dense_memory", backend, run, draw_leaves(num_tokens, dtype))


@pytest.mark.parametrize("topk", [1, 3, 50])
@pytest.mark.parametrize("with_lengths", [False, True])
@pytest.mark.parametrize("with_initial", [False, True])
@pytest.mark.parametrize("backend", candidates("dense_memory"))
def test_optional_arguments(
    backend: str, with_initial: bool, with_lengths: bool, topk: int
) -> None:
    def run_topk(backend: str, **leaves: Tensor | None) -> Outputs:
        return run(backend, topk=topk, **leaves)

    leaves = draw_leaves(20, torch.float64, with_initial=with_initial, with_lengths=with_lengths)
    compare_with_reference("dense_memory", backend, run_topk, leaves)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("backend", candidates("dense_memory"))
def test_thousand_tokens(backend: str, dtype: torch.dtype) -> None:
    compare_with_reference("dense_memory", backend, run, draw_leaves(1000, dtype))


@pytest.mark.parametrize("backend", ALL)
def test_gradcheck(backend: str) -> None:
    leaves = draw_leaves(4, torch.float64, batch=1, seed=2)
    leaves["keys"] = leaves["keys"] + 0.1 * leaves["queries"]  # no ties
    names = [name for name, leaf in leaves.items() if leaf is not None and leaf.is_floating_point()]

    def run_floats(*floats: Tensor) -> tuple[Tensor, ...]:
        outputs = run(backend, topk=2, **(leaves | dict(zip(names, floats, strict=True))))
        return tuple(value for value in outputs.values() if value.is_floating_point())

    floats = [leaves[name].clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(run_floats, floats)


# Against plain Python: values are the axes, so that the context is the weight of every entry.

CODEBOOK = [[1.0, 0.0, 0.0], [0.9, 0.43, 0.1], [-1.3, 0.31, -0.22], [0.11, 2.3, 1.7], [0.0] * 3]


def weigh_by_hand(query: int, keys: list[int], visible: list[bool], topk: int) -> list[float]:
    """Return the weight of every entry for one query."""

    def cosine(key: int) -> float:
        a, b = CODEBOOK[query], CODEBOOK[key]
        norms = max(math.hypot(*a), 1e-12) * max(math.hypot(*b), 1e-12)
        return math.fsum(x * y for x, y in zip(a, b, strict=True)) / norms

    seen = [i for i in range(len(keys)) if visible[i]]
    best = sorted(seen, key=lambda i: (-round(cosine(keys[i]), 6), i))[:topk]
    terms = {i: math.exp(8 * cosine(keys[i]) / math.sqrt(3)) for i in best}
    return [terms.get(i, 0.0) / (sum(terms.values()) or 1.0) for i in range(len(keys))]


@settings(max_examples=60)
@given(data=st.data())
def test_weights_equal_those_by_hand(data: st.DataObject) -> None:
    num_before, num_tokens = data.draw(st.integers(0, 4)), data.draw(st.integers(1, 12))
    total = num_before + num_tokens
    vectors = st.lists(st.integers(0, 4), min_size=total, max_size=total)
    queries, keys = data.draw(vectors)[num_before:], data.draw(vectors)
    valid = data.draw(st.lists(st.booleans(), min_size=total, max_size=total))
    length = data.draw(st.integers(0, num_tokens))
    topk, chunk_size = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 14))
    codebook = torch.tensor(CODEBOOK, dtype=torch.float64)
    units = torch.eye(total, dtype=torch.float64).unsqueeze(0)
    before = DenseMemory(
        codebook[keys[:num_before]].view(1, num_before, 3),
        units[:, :num_before],
        torch.tensor(valid[:num_before], dtype=torch.bool).unsqueeze(0),
    )
    for backend in ALL:
        context, final = read_dense_memory(
            codebook[queries].unsqueeze(0),
            codebook[keys[num_before:]].unsqueeze(0),
            units[:, num_before:],
            writable=torch.tensor(valid[num_before:]).unsqueeze(0),
            topk=topk,
            initial=before,
            lengths=torch.tensor([length]),
            chunk_size=chunk_size,
            backend=backend,
        )
        kept = [valid[i] and i < num_before + length for i in range(total)]
        assert final.valid[0].tolist() == kept
        for t in range(num_tokens):
            visible = [kept[i] and i < num_before + t and t < length for i in range(total)]
            expected = weigh_by_hand(queries[t], keys, visible, topk)
            assert context[0, t].tolist() == pytest.approx(expected, abs=1e-12), (backend, t)


def test_nearest_cosines_go_to_the_lowest_index() -> None:
    """Cosines are compared in multiples of 2^-26; nothing finer may decide."""
    units = UNIT_GRID * torch.tensor([[[0.0], [4.0], [8.0], [2.0**26]]], dtype=torch.float64)
    query_units = torch.tensor([[[UNIT_GRID]]], dtype=torch.float64)
    visible = torch.ones(1, 1, 4, dtype=torch.bool)
    assert choose_entries(query_units, units, visible, 4).tolist() == [[[3, 0, 1, 2]]]


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("split", [1, 7, 19])
def test_split_equals_one_pass(backend: str, split: int) -> None:
    leaves = draw_leaves(20, torch.float64)
    whole = run(backend, **leaves)
    per_token = ("queries", "keys", "values", "writable")
    first = leaves | {name: leaves[name][:, :split] for name in per_token}
    first["lengths"] = leaves["lengths"].clamp_max(split)
    second = leaves | {name: leaves[name][:, split:] for name in per_token}
    second["lengths"] = (leaves["lengths"] - split).clamp_min(0)
    left = run(backend, **first)
    carried = {f"initial_{name}": left[name] for name in DenseMemory._fields}
    right = run(backend, **(second | carried))
    joined = torch.cat([left["context"], right["context"]], dim=1)
    torch.testing.assert_close(joined, whole["context"])
    for name in DenseMemory._fields:
        assert torch.equal(right[name], whole[name])


@pytest.mark.parametrize("backend", ALL)
def test_appends_only(backend: str) -> None:
    leaves = draw_leaves(6, torch.float64)
    outputs = run(backend, **leaves)
    written = leaves["writable"] & (torch.arange(6) < leaves["lengths"][:, None])
    for name, before, after in (
        ("keys", leaves["initial_keys"], leaves["keys"]),
        ("values", leaves["initial_values"], leaves["values"]),
        ("valid", leaves["initial_valid"], written),
    ):
        assert torch.equal(outputs[name], torch.cat([before, after], dim=1))
    assert not outputs["context"][1].any()  # a row without tokens
    assert not outputs["context"][2, 3:].any()  # padding


@pytest.mark.parametrize("backend", ALL)
def test_best_one_is_copied(backend: str) -> None:
    """With K = 1 the weight is exactly 1, and queries and keys learn exactly nothing."""
    leaves = draw_leaves(30, torch.float32, with_lengths=False)
    queries = leaves["queries"].clone().requires_grad_()
    keys = leaves["keys"].clone().requires_grad_()
    outputs = run(backend, topk=1, **(leaves | {"queries": queries, "keys": keys}))
    stored = outputs["values"].unsqueeze(1)  # [B, 1, P + T, Dv]
    is_copy = (outputs["context"].unsqueeze(2) == stored).all(-1).any(-1)  # [B, T]
    has_entries = outputs["valid"].cumsum(1)[:, 3:-1] > 0
    assert torch.equal(is_copy, has_entries)
    outputs["context"].square().sum().backward()
    assert not queries.grad.any()
    assert not keys.grad.any()


@pytest.mark.parametrize("chunk_size", [1, 3, 10, 64])
def test_chunks_change_nothing(chunk_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    leaves = draw_leaves(10, torch.float64)
    expected = run("parallel", chunk_size=256, **leaves)
    seen = []

    def choose(query_units: Tensor, units: Tensor, visible: Tensor, topk: int) -> Tensor:
        seen.append(query_units.shape[1])
        return choose_entries(query_units, units, visible, topk)

    monkeypatch.setattr(parallel, "choose_entries", choose)
    outputs = run("parallel", chunk_size=chunk_size, **leaves)
    assert max(seen) <= chunk_size
    assert sum(seen) == 10
    for name, value in expected.items():
        assert torch.equal(outputs[name], value)


@pytest.mark.parametrize("backend", ALL)
def test_half_precision_is_computed_in_float32(backend: str) -> None:
    leaves = draw_leaves(10, torch.bfloat16)
    wide = {
        name: leaf.float() if leaf.is_floating_point() else leaf for name, leaf in leaves.items()
    }
    expected = run(backend, **wide)
    for outputs in (run(backend, **leaves), _run_autocast(backend, leaves)):
        assert outputs["context"].dtype == torch.bfloat16
        assert torch.equal(outputs["context"], expected["context"].bfloat16())
        for name in DenseMemory._fields:
            assert torch.equal(outputs[name], expected[name])


def _run_autocast(backend: str, leaves: Leaves) -> Outputs:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return run(backend, **leaves)


def test_auto_is_parallel() -> None:
    leaves = draw_leaves(10, torch.float32)
    expected = run("parallel", **leaves)
    assert all(torch.equal(value, expected[name]) for name, value in run("auto", **leaves).items())


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("queries", torch.zeros(3, 0, 8), "queries has shape"),
        ("keys", torch.zeros(3, 4, 7), "keys has shape .* C = 8"),
        ("writable", torch.zeros(3, 4), "writable has dtype"),
        ("lengths", torch.zeros(3), "lengths has dtype"),
        ("initial_values", torch.zeros(3, 4, 6), "initial.values has shape"),
    ],
)
def test_what_does_not_fit_raises(name: str, wrong: Tensor, message: str) -> None:
    leaves = draw_leaves(4, torch.float32)
    with pytest.raises(InputError, match=message):
        run("parallel", **(leaves | {name: wrong}))


def test_unknown_numbers_and_names_raise() -> None:
    leaves = draw_leaves(4, torch.float32)
    with pytest.raises(InputError, match="topk is 0"):
        run("parallel", topk=0, **leaves)
    with pytest.raises(InputError, match="'native' is not available for dense_memory"):
        run("native", **leaves)
