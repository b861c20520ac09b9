"""Slots: E6 read score, E7 allocation, E8 log strength, E9 pointer weights."""

import math

import pytest
import torch
from torch import Tensor

from tests.ops.oracle import Outputs, candidates, compare_with_reference, list_backends
from unimatrix.errors import InputError
from unimatrix.ops import slots
from unimatrix.ops.slots import SlotRead, SlotState, choose_backend, empty_slots, scan_slots

ALL = list_backends("slots")
LENGTHS = (1, 2, 63, 64, 65, 100)
Leaves = dict[str, Tensor | None]
pytestmark = pytest.mark.usefixtures("one_thread")


def draw_leaves(
    num_tokens: int,
    dtype: torch.dtype,
    *,
    batch: int = 3,
    num_slots: int = 6,
    key_size: int = 8,
    with_initial: bool = True,
    with_lengths: bool = True,
    seed: int = 0,
) -> Leaves:
    """Return inputs in which matches, refusals, strengths below the floor and evictions occur."""
    generator = torch.Generator().manual_seed(seed + num_tokens)
    value_size = 5

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64).to(dtype)

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=generator)

    codebook = normal(2 * num_slots, key_size)
    picked = codebook[integers(len(codebook), batch, num_tokens)]
    writable = uniform(batch, num_tokens) > 0.1
    writable[:, 0] = False
    leaves: Leaves = {
        "queries": normal(batch, num_tokens, key_size),
        "keys": picked + 0.1 * normal(batch, num_tokens, key_size),
        "values": normal(batch, num_tokens, value_size),
        "strengths": uniform(batch, num_tokens),
        "token_ids": integers(50, batch, num_tokens),
        "writable": writable,
        "lengths": torch.tensor([num_tokens, 0, num_tokens // 2])[:batch] if with_lengths else None,
        "slot_keys": normal(batch, num_slots, key_size),
        "slot_values": normal(batch, num_slots, value_size),
        "slot_strength": uniform(batch, num_slots) * (uniform(batch, num_slots) > 0.4),
        "slot_age": integers(9, batch, num_slots),
        "slot_token_ids": integers(50, batch, num_slots),
    }
    empty = empty_slots(batch, num_slots, key_size, value_size, dtype=dtype)
    return leaves if with_initial else leaves | empty._asdict()


def run(backend: str, *, slots_per_read: int = 4, **leaves: Tensor | None) -> Outputs:
    """Run the operator on named leaves and name its outputs."""
    tensors = dict(leaves)
    initial = SlotState(*(tensors.pop(name) for name in SlotState._fields))
    read, final = scan_slots(
        **tensors, slots_per_read=slots_per_read, initial=initial, backend=backend
    )
    return read._asdict() | final._asdict()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("num_tokens", LENGTHS)
@pytest.mark.parametrize("backend", candidates("slots"))
def test_backend_equals_reference(backend: str, num_tokens: int, dtype: torch.dtype) -> None:
    leaves = draw_leaves(num_tokens, dtype)
    compare_with_reference("slots", backend, run, leaves)


@pytest.mark.parametrize("with_lengths", [False, True])
@pytest.mark.parametrize("with_initial", [False, True])
@pytest.mark.parametrize("backend", candidates("slots"))
def test_optional_arguments(backend: str, with_initial: bool, with_lengths: bool) -> None:
    leaves = draw_leaves(
        20, torch.float64, with_initial=with_initial, with_lengths=with_lengths, seed=1
    )
    compare_with_reference("slots", backend, run, leaves)


@pytest.mark.parametrize(("num_slots", "slots_per_read"), [(1, 1), (1, 4), (3, 8), (9, 1)])
@pytest.mark.parametrize("backend", candidates("slots"))
def test_sizes(backend: str, num_slots: int, slots_per_read: int) -> None:
    def run_sized(backend: str, **leaves: Tensor | None) -> Outputs:
        outputs = run(backend, slots_per_read=slots_per_read, **leaves)
        assert outputs["pointer_weights"].shape[-1] == min(num_slots, slots_per_read)
        return outputs

    leaves = draw_leaves(17, torch.float64, num_slots=num_slots, key_size=3)
    compare_with_reference("slots", backend, run_sized, leaves)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("backend", candidates("slots"))
def test_thousand_tokens(backend: str, dtype: torch.dtype) -> None:
    leaves = draw_leaves(1000, dtype, num_slots=32, key_size=16)
    compare_with_reference("slots", backend, run, leaves)


@pytest.mark.parametrize("backend", ALL)
def test_gradcheck(backend: str) -> None:
    leaves = draw_leaves(4, torch.float64, batch=1, num_slots=2, key_size=3, seed=3)
    names = [name for name, leaf in leaves.items() if leaf is not None and leaf.is_floating_point()]

    def run_floats(*floats: Tensor) -> tuple[Tensor, ...]:
        outputs = run(backend, slots_per_read=2, **(leaves | dict(zip(names, floats, strict=True))))
        return tuple(value for value in outputs.values() if value.is_floating_point())

    floats = [leaves[name].clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(run_floats, floats)


@pytest.mark.parametrize("backend", ALL)
def test_reads_before_it_writes(backend: str) -> None:
    """Two slots, three writes of orthogonal keys: fill, fill, evict the oldest; then a match."""
    axis = torch.eye(3, dtype=torch.float64)
    keys = axis[torch.tensor([[0, 0, 1, 2, 1]])]
    queries = axis[torch.tensor([[0, 0, 0, 0, 0]])]
    token_ids = torch.tensor([[10, 11, 12, 13, 14]])
    read, final = scan_slots(
        queries,
        keys,
        axis[torch.tensor([[0, 1, 2, 0, 1]])],
        torch.tensor([[1.0, 1.0, 0.5, 0.5, 0.25]], dtype=torch.float64),
        token_ids,
        writable=torch.tensor([[False, True, True, True, True]]),
        slots_per_read=2,
        initial=empty_slots(1, 2, 3, 3, dtype=torch.float64),
        backend=backend,
    )
    # Nothing before the first write is read; 11 matches the query, 13 evicts it, 14 matches 12.
    # At the end both slots are orthogonal to the query and equally strong: slot order.
    assert read.pointer_token_ids[0].tolist() == [[0, 0], [0, 0], [11, 0], [11, 12], [13, 12]]
    assert final.slot_token_ids.tolist() == [[13, 14]]
    assert final.slot_age.tolist() == [[1, 0]]
    assert final.slot_strength.tolist() == [[0.5, 0.25]]
    scores = torch.tensor([1 / math.sqrt(3), math.log(0.5)], dtype=torch.float64)
    torch.testing.assert_close(read.pointer_weights[0, 3], torch.softmax(8 * scores, 0))


@pytest.mark.parametrize("backend", ALL)
def test_strength_learns_through_later_reads(backend: str) -> None:
    leaves = draw_leaves(12, torch.float64, with_lengths=False, seed=5)
    strengths = leaves["strengths"].clamp_min(0.1).requires_grad_()
    filled = {"strengths": strengths, "slot_strength": torch.ones(3, 6, dtype=torch.float64)}
    outputs = run(backend, slots_per_read=6, **(leaves | filled))
    outputs["pointer_weights"].square().sum().backward()
    later = leaves["writable"][:, :-1]
    assert strengths.grad[:, :-1][later].abs().min() > 0
    assert strengths.grad[:, 0].abs().max() == 0  # position 0 does not write
    assert strengths.grad[:, -1].abs().max() == 0  # nothing reads what the last one writes


@pytest.mark.parametrize("backend", ALL)
def test_padding_changes_nothing(backend: str) -> None:
    leaves = draw_leaves(9, torch.float32)
    outputs = run(backend, **(leaves | {"lengths": torch.tensor([0, 0, 4])}))
    for name in SlotState._fields:
        assert torch.equal(outputs[name][:2], leaves[name][:2])
    for name in SlotRead._fields:
        assert not outputs[name][:2].any()
        assert not outputs[name][2, 4:].any()
    short = {name: leaf[2:, :4] if name in SHORT else leaf[2:] for name, leaf in leaves.items()}
    expected = run(backend, **(short | {"lengths": None}))
    for name in SlotState._fields:
        assert torch.equal(outputs[name][2:], expected[name])


SHORT = ("queries", "keys", "values", "strengths", "token_ids", "writable")


@pytest.mark.parametrize("num_threads", [2, 4])
def test_threads_change_nothing(num_threads: int) -> None:
    leaves = draw_leaves(200, torch.float64, num_slots=32, key_size=32)  # enough to be threaded
    expected = run("native", **leaves)
    torch.set_num_threads(num_threads)
    assert all(
        torch.equal(value, expected[name]) for name, value in run("native", **leaves).items()
    )


@pytest.mark.parametrize("backend", ALL)
def test_half_precision_is_computed_in_float32(backend: str) -> None:
    leaves = draw_leaves(10, torch.bfloat16)
    outputs = run(backend, **leaves)
    wide = {
        name: leaf.float() if leaf is not None and leaf.is_floating_point() else leaf
        for name, leaf in leaves.items()
    }
    expected = run(backend, **wide)
    for name in ("context", "pointer_weights"):
        assert outputs[name].dtype == torch.bfloat16
        assert torch.equal(outputs[name], expected[name].bfloat16())
    for name in SlotState._fields:
        assert torch.equal(outputs[name], expected[name])


@pytest.mark.parametrize("backend", ALL)
def test_autocast_changes_nothing(backend: str) -> None:
    leaves = draw_leaves(10, torch.float32)
    expected = run(backend, **leaves)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = run(backend, **leaves)
    for name, value in expected.items():
        assert torch.equal(outputs[name], value)


@pytest.mark.parametrize("backend", ALL)
def test_not_a_number_stays_visible(backend: str) -> None:
    leaves = draw_leaves(8, torch.float32, with_lengths=False)
    leaves["queries"][0, 5] = math.nan
    outputs = run(backend, **leaves)
    assert outputs["context"][0, 5].isnan().all()
    assert outputs["context"][1:].isfinite().all()


@pytest.mark.parametrize("backend", ALL)
def test_inputs_are_not_modified(backend: str) -> None:
    leaves = draw_leaves(8, torch.float64)
    copies = {name: leaf.clone() for name, leaf in leaves.items()}
    outputs = run(backend, **leaves)
    for name, leaf in leaves.items():
        assert torch.equal(leaf, copies[name])
    for value in outputs.values():
        assert all(value.data_ptr() != leaf.data_ptr() for leaf in leaves.values())


def test_ties_go_to_the_lowest_slot() -> None:
    """Keys of one direction but other lengths tie exactly, whatever the order of a sum."""
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(64, generator=generator)
    lengths = torch.tensor([4.0, 0.5, 8.0, 1.0, 2.0])
    initial = empty_slots(1, 5, 64, 1)._replace(
        slot_keys=(lengths[:, None] * key).unsqueeze(0),
        slot_strength=torch.full((1, 5), 0.5),
        slot_token_ids=torch.arange(5).unsqueeze(0),
    )
    for backend in ALL:
        read, _ = scan_slots(
            key.view(1, 1, 64),
            key.view(1, 1, 64),
            torch.ones(1, 1, 1),
            torch.ones(1, 1),
            torch.zeros(1, 1, dtype=torch.int64),
            writable=torch.zeros(1, 1, dtype=torch.bool),
            slots_per_read=3,
            initial=initial,
            backend=backend,
        )
        assert read.pointer_token_ids.tolist() == [[[0, 1, 2]]], backend


@pytest.mark.parametrize("compiles", [False, True])
def test_auto_on_a_gpu(compiles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots.scan, "compiles_triton", lambda device: compiles)
    cuda = torch.device("cuda")
    assert choose_backend(cuda, 1) == "parallel"
    assert choose_backend(cuda, 128, 256, 64) == ("triton" if compiles else "native")
    assert choose_backend(cuda, 128, 257, 64) == "native"


def test_auto_is_native_on_cpu() -> None:
    assert choose_backend(torch.device("cpu"), 1) == "native"
    leaves = draw_leaves(8, torch.float32)
    expected = run("native", **leaves)
    assert all(torch.equal(value, expected[name]) for name, value in run("auto", **leaves).items())


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("queries", torch.zeros(3, 0, 8), "queries has shape \\[3, 0, 8\\]"),
        ("keys", torch.zeros(3, 4, 7), "keys has shape .* C = 8"),
        ("strengths", torch.zeros(3, 4, 1), "strengths has shape"),
        ("values", torch.zeros(3, 4, 5, dtype=torch.int64), "values has dtype torch.int64"),
        ("token_ids", torch.zeros(3, 4), "token_ids has dtype"),
        ("writable", torch.zeros(3, 4), "writable has dtype"),
        ("lengths", torch.zeros(2, dtype=torch.int64), "lengths has shape"),
        ("slot_values", torch.zeros(3, 6, 4), "slot_values has shape"),
        ("slot_age", torch.zeros(3, 6), "slot_age has dtype"),
    ],
)
def test_what_does_not_fit_raises(name: str, wrong: Tensor, message: str) -> None:
    leaves = draw_leaves(4, torch.float32)
    with pytest.raises(InputError, match=message):
        run("native", **(leaves | {name: wrong}))


def test_unknown_numbers_and_names_raise() -> None:
    leaves = draw_leaves(4, torch.float32)
    with pytest.raises(InputError, match="slots_per_read is 0"):
        run("native", slots_per_read=0, **leaves)
    with pytest.raises(InputError, match="'fused' is not available for slots"):
        run("fused", **leaves)
