"""Triton's kernels against the reference: on a GPU, or interpreted on the CPU at tiny shapes."""

import contextlib
import functools
import importlib
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops import test_matrix_state, test_selective_slots, test_slot_decisions, test_slots
from tests.ops.oracle import Outputs, Run, compare_with_reference
from tests.tolerances import error, limit
from unimatrix.configuration import UniMatrixConfig
from unimatrix.errors import InputError
from unimatrix.modeling import UniMatrixForCausalLM
from unimatrix.ops import backends
from unimatrix.ops.backends import BACKENDS
from unimatrix.ops.selective_slots import (
    SelectiveSlots,
    empty_selective_slots,
    scan_selective_slots,
)

pytest.importorskip("triton", reason="Triton is not installed")

from unimatrix.ops.triton import INTERPRETED

DEVICES = [
    pytest.param(
        "cpu",
        marks=pytest.mark.skipif(
            not INTERPRETED, reason="compiled for the GPU here; TRITON_INTERPRET=1 interprets"
        ),
    ),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
LENGTHS = (1, 2, 17, 33)
LONG = (64, 100, 1000)
RULES = ("outer", "mixed")
on_each_device = pytest.mark.parametrize("device", DEVICES)
pytestmark = pytest.mark.usefixtures("one_thread")


def run_on(device: str, run: Run) -> Run:
    """Let ``run`` have Triton's inputs on a device, and the reference's on the CPU."""

    def moved(backend: str, **leaves: torch.Tensor | None) -> Outputs:
        place = device if backend == "triton" else "cpu"
        inputs = {name: None if x is None else x.to(place) for name, x in leaves.items()}
        outputs = run(backend, **inputs)
        return {name: None if x is None else x.cpu() for name, x in outputs.items()}

    return moved


@contextlib.contextmanager
def poison_empty_tensors(device: str) -> Iterator[None]:
    """Fill every ``torch.empty`` with NaN on the CPU: nothing may be read that was not written."""
    torch.use_deterministic_algorithms(device == "cpu")
    yield
    torch.use_deterministic_algorithms(False)


def compare_matrix_state(
    device: str,
    num_tokens: int,
    *,
    rule: str = "mixed",
    dtype: torch.dtype = torch.float64,
    sizes: tuple[int, int, int] = (2, 1, 16),
    initial: bool = True,
    padded: bool = True,
    chunk_size: int = 16,
) -> None:
    leaves = test_matrix_state.draw_leaves(
        num_tokens, rule=rule, dtype=dtype, sizes=sizes, initial=initial
    )
    lengths = torch.tensor([num_tokens, num_tokens // 2, 0])[: sizes[0]] if padded else None
    run = functools.partial(test_matrix_state.scan, chunk_size=chunk_size)
    with poison_empty_tensors(device):
        compare_with_reference(
            "matrix_state", "triton", run_on(device, run), leaves | {"lengths": lengths}
        )


def compare_slots(device: str, num_tokens: int, dtype: torch.dtype, **sizes: int) -> None:
    leaves = test_slots.draw_leaves(num_tokens, dtype, **sizes)
    compare_with_reference("slots", "triton", run_on(device, test_slots.run), leaves)


def compare_selective_slots(device: str, num_tokens: int, options: dict) -> None:
    inputs = test_selective_slots.draw(2, num_tokens, seed=num_tokens)
    given = (
        empty_selective_slots(2, 4, 100),
        torch.tensor([0, 5]),
        torch.tensor([num_tokens, num_tokens // 2]),
    )
    scans = []
    for backend, place in (("reference", "cpu"), ("triton", device)):
        initial, first_position, lengths = given
        scan = scan_selective_slots(
            *(x.to(place) for x in inputs),
            initial=type(initial)(*(x.to(place) for x in initial)),
            first_position=first_position.to(place),
            lengths=lengths.to(place),
            backend=backend,
            **options,
        )
        parts = [*scan.lookup, *(scan.slots or ()), scan.writers]
        scans.append([x.cpu() for x in parts if x is not None])
    for expected, actual in zip(*scans, strict=True):
        assert torch.equal(actual, expected)
        assert actual.dtype == expected.dtype


@on_each_device
def test_selective_slots_lie_in_memory_in_any_order(device: str) -> None:
    inputs = [x.to(device) for x in test_selective_slots.draw(2, 5, seed=0)]
    initial = [x.to(device) for x in empty_selective_slots(2, 4, 100)]
    turned = [x.T.contiguous().T for x in initial]
    asked, *others = inputs
    across = asked.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    scans = [
        scan_selective_slots(*given, initial=SelectiveSlots(*slots), backend="triton")
        for given, slots in ((inputs, initial), ((across, *others), turned))
    ]
    test_selective_slots.assert_same(*scans)


COMPARISONS = {
    "matrix_state": lambda device, T: [compare_matrix_state(device, T, rule=r) for r in RULES],
    "slots": lambda device, T: compare_slots(device, T, torch.float64, batch=2),
    "selective_slots": lambda device, T: [
        compare_selective_slots(device, T, options)
        for options in test_selective_slots.OPTIONS[:: 1 if T < 17 else 3]
    ],
}


@on_each_device
@pytest.mark.parametrize("num_tokens", LENGTHS)
@pytest.mark.parametrize("op", [op for op in BACKENDS if "triton" in BACKENDS[op]])
def test_equals_reference(op: str, num_tokens: int, device: str) -> None:
    COMPARISONS[op](device, num_tokens)


@on_each_device
def test_matrix_state_without_padding_and_initial_state(device: str) -> None:
    compare_matrix_state(device, 17, initial=False, padded=False)


@on_each_device
@pytest.mark.parametrize(("n", "rule"), [(5, "mixed"), (33, "outer"), (64, "mixed")])
def test_matrix_state_in_parts_and_padded_columns(n: int, rule: str, device: str) -> None:
    compare_matrix_state(device, 17, rule=rule, dtype=torch.float32, sizes=(1, 1, n), padded=False)


@on_each_device
def test_matrix_state_of_extreme_retention(device: str) -> None:
    """Retention near 1 and near 0 side by side, and 0 itself, which has gradient 0."""
    leaves = test_matrix_state.draw_leaves(33, dtype=torch.float32, sizes=(2, 1, 16))
    values = torch.tensor([-1e-3, -1e-6, -50.0, -1.0, -200.0, -torch.inf])
    leaves["log_retention"] = values[torch.arange(66).view(2, 33, 1) ** 2 % 17 % 6]
    run = functools.partial(test_matrix_state.scan, chunk_size=16)
    compare_with_reference("matrix_state", "triton", run_on(device, run), leaves)


@on_each_device
def test_padding_is_not_there(device: str) -> None:
    """Whatever padding holds, NaN too, the state stays bitwise and gradients are zero."""
    leaves = test_matrix_state.draw_leaves(20, dtype=torch.float32, sizes=(2, 1, 16))
    lengths = torch.tensor([11, 0])
    padded = torch.arange(20) >= lengths[:, None]
    initial = leaves.pop("initial_state").to(device)
    outs = []
    for garbage in (0.5, torch.nan):
        tokens = {
            name: x.masked_fill(padded[..., *[None] * (x.dim() - 2)], garbage)
            .to(device)
            .requires_grad_()
            for name, x in leaves.items()
        }
        out = test_matrix_state.scan(
            "triton", **tokens, initial_state=initial, lengths=lengths.to(device), chunk_size=16
        )
        grads = torch.autograd.grad(out["y"].sum() + out["final_state"].sum(), [*tokens.values()])
        assert all((grad.cpu()[padded] == 0).all() for grad in grads)
        assert torch.equal(out["final_state"][1], initial[1])
        outs.append([*out.values(), *grads])
    assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))


@on_each_device
def test_low_precision_is_summed_in_float32(device: str) -> None:
    leaves = test_matrix_state.draw_leaves(17, dtype=torch.bfloat16, sizes=(1, 1, 16))
    given = {name: x.to(device).requires_grad_() for name, x in leaves.items()}
    out = test_matrix_state.scan("triton", **given)
    wide = {name: x.detach().float() for name, x in given.items()}
    expected = test_matrix_state.scan("triton", **wide)
    # A GPU rounds to the nearest; the interpreter cuts off.
    assert error(out["y"], expected["y"]) <= (2**-7 if device == "cpu" else 2**-8)
    assert out["final_state"].dtype == torch.float32
    # 16 bits are multiplied as TF32, whose factors keep 11 binary digits; the interpreter does not.
    tf32 = 2**-10 if device == "cuda" else limit("matrix_state", torch.float32, "value")
    assert error(out["final_state"], expected["final_state"]) <= tf32
    for grad in torch.autograd.grad(out["y"].sum(), [*given.values()]):
        assert grad.dtype == torch.bfloat16
        assert grad.isfinite().all()


@on_each_device
def test_slots_in_float32_and_sizes(device: str) -> None:
    compare_slots(device, 17, torch.float32)
    compare_slots(device, 17, torch.float64, batch=1, num_slots=3, key_size=3)


@on_each_device
@settings(max_examples=12)
@given(
    rows=test_slot_decisions.draw_rows(),
    slots_per_read=st.integers(1, 7),
    match_threshold=st.sampled_from([0.85, 0.95, 2.0, -2.0]),
)
def test_drawn_slot_decisions(
    rows: list, slots_per_read: int, match_threshold: float, device: str
) -> None:
    tensors = test_slot_decisions.build_tensors(rows)
    options = {"slots_per_read": slots_per_read, "match_threshold": match_threshold}
    expected = test_slot_decisions.scan("reference", tensors, **options)
    moved = {name: x.to(device) for name, x in tensors.items()}
    actual = test_slot_decisions.scan("triton", moved, **options)
    assert torch.equal(actual[0].pointer_token_ids.cpu(), expected[0].pointer_token_ids)
    for name in ("slot_keys", "slot_strength", "slot_age", "slot_token_ids"):
        assert torch.equal(getattr(actual[1], name).cpu(), getattr(expected[1], name)), name


@on_each_device
def test_ties_go_to_the_lowest_slot(device: str) -> None:
    """All keys are one direction: every decision is a tie."""
    leaves = test_slots.draw_leaves(9, torch.float64, batch=1)
    key = leaves["keys"][:, :1]
    same = {name: key.expand_as(leaves[name]) for name in ("queries", "keys", "slot_keys")}
    same["slot_strength"] = torch.full_like(leaves["slot_strength"], 0.5)
    same["strengths"] = torch.full_like(leaves["strengths"], 0.5)
    run = run_on(device, test_slots.run)
    expected, actual = (run(backend, **(leaves | same)) for backend in ("reference", "triton"))
    for name in ("pointer_token_ids", "slot_age", "slot_token_ids"):
        assert torch.equal(actual[name], expected[name])


@on_each_device
def test_deterministic_algorithms_are_respected(device: str) -> None:
    leaves = test_slots.draw_leaves(5, torch.float64, batch=1)
    torch.use_deterministic_algorithms(True)
    try:
        compare_with_reference("slots", "triton", run_on(device, test_slots.run), leaves)
    finally:
        torch.use_deterministic_algorithms(False)


@on_each_device
@pytest.mark.parametrize("preset", ["selective", "sparsepointer"])
def test_model(preset: str, device: str) -> None:
    """A whole model with every operator in Triton that has one: logits, loss and gradients."""
    torch.manual_seed(0)
    small = {"num_hidden_layers": 2, "num_attention_heads": 1, "dropout": 0.0}
    model = UniMatrixForCausalLM(UniMatrixConfig.preset(preset, **small)).train()
    ids = torch.randint(0, 256, (2, 6))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    results = []
    for backend, place in (("auto", "cpu"), ("triton", device)):
        model.to(place).zero_grad()
        model.set_backend({op: backend for op in BACKENDS if "triton" in BACKENDS[op]})
        output = model(ids.to(place), attention_mask=mask.to(place), labels=ids.to(place))
        output.loss.backward()
        grads = {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}
        results.append((output.logits.detach().cpu(), grads))
    (expected, expected_grads), (actual, grads) = results
    assert error(actual, expected) <= limit("model", torch.float32, "value")
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        assert error(grad, expected_grads[name]) <= limit("golden", torch.float32, "grad"), name


@on_each_device
@pytest.mark.parametrize("preset", ["selective", "sparsepointer"])
def test_a_train_step_is_one_graph_with_the_same_numbers(preset: str, device: str) -> None:
    """``torch.compile`` takes the kernels as they are, and differentiates through them."""
    torch.manual_seed(0)
    small = {"num_hidden_layers": 2, "num_attention_heads": 1, "dropout": 0.0}
    model = UniMatrixForCausalLM(UniMatrixConfig.preset(preset, **small)).to(device).train()
    model.set_backend({op: "triton" for op in BACKENDS if "triton" in BACKENDS[op]})
    ids = torch.randint(0, 256, (2, 6), device=device)
    torch.compiler.reset()
    captured = torch.compile(model, backend="aot_eager", fullgraph=True)
    results = []
    for run in (model, captured):
        model.zero_grad()
        with warnings.catch_warnings():  # of torch's own making
            warnings.simplefilter("ignore")
            loss = run(input_ids=ids, labels=ids, use_cache=False, loss_only=True).loss
        loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append({"loss": loss.detach(), **grads})
    expected, found = results
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert error(found[name], value) <= limit("golden", torch.float32, "grad"), name


def draw_operator(op: str) -> tuple[object, ...]:
    """Return small arguments of an operator that ``torch.compile`` takes whole."""
    if op == "scan_chunks":
        importlib.import_module("unimatrix.ops.matrix_state.triton")  # declares it
        leaves = test_matrix_state.draw_leaves(17, dtype=torch.float32, sizes=(2, 1, 16))
        *tokens, initial = (x.requires_grad_() for x in leaves.values())
        return *tokens, torch.tensor([17, 5]), initial, 16
    if op == "allocate_slots":
        keys, ages = torch.randn(2, 9, 6), torch.zeros(4, 2, dtype=torch.int64).T
        real = torch.ones(2, 5, dtype=torch.bool)
        return keys[:, :5], keys, torch.rand(2, 9), ages, real, real, 3, 0.85, 0.05, "triton"
    asked, offered, ids, codes = test_selective_slots.draw(2, 5, seed=0)
    lengths = torch.full((2,), 5)
    writes = [asked, offered, ids, codes, 0 * lengths, lengths]
    return writes, list(empty_selective_slots(2, 4, 100)), True, [8, 0, 3], "triton"


@on_each_device
@pytest.mark.parametrize("op", ["scan_chunks", "allocate_slots", "scan_selective_slots"])
def test_an_operator_keeps_its_promises(op: str, device: str) -> None:
    """Shapes, strides and derivative that are announced are those that come."""
    given = torch.utils._pytree.tree_map(
        lambda x: x.to(device) if isinstance(x, torch.Tensor) else x, draw_operator(op)
    )
    found = torch.library.opcheck(getattr(torch.ops.unimatrix, op), given)
    assert set(found.values()) == {"SUCCESS"}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("num_tokens", LONG)
def test_long_rows_on_a_gpu(num_tokens: int, dtype: torch.dtype) -> None:
    for n, rule in ((16, "outer"), (32, "mixed"), (64, "mixed"), (128, "outer"), (128, "mixed")):
        compare_matrix_state("cuda", num_tokens, rule=rule, dtype=dtype, sizes=(3, 2, n))
    compare_slots("cuda", num_tokens, dtype, num_slots=32, key_size=64)
    for options in test_selective_slots.OPTIONS:
        compare_selective_slots("cuda", num_tokens, options)


@pytest.mark.gpu
def test_training_on_a_gpu_is_that_on_the_cpu() -> None:
    """The first steps of the default model: ``auto`` on a GPU beside ``auto`` on the CPU."""
    ids = torch.randint(0, 256, (4, 65), generator=torch.Generator().manual_seed(0))
    losses = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = UniMatrixForCausalLM(UniMatrixConfig.preset("selective", dropout=0.0))
        model.to(device).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        losses.append([])
        for _ in range(3):
            loss = model(ids.to(device), labels=ids.to(device)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert error(torch.tensor(losses[1]), torch.tensor(losses[0])) <= limit(
        "model", torch.float32, "value"
    )


@pytest.mark.gpu
def test_simple_gla_is_the_outer_rule_and_takes_so_long(capsys: pytest.CaptureFixture) -> None:
    """Flash-linear-attention's kernel, k and v exchanged, beside ours; ``-s`` shows the times."""
    simple_gla = pytest.importorskip(
        "fla.ops.simple_gla", reason="flash-linear-attention is absent"
    )
    leaves = test_matrix_state.draw_leaves(
        2048, rule="outer", dtype=torch.float32, sizes=(8, 8, 64), initial=False
    )
    leaves = {name: x.cuda().requires_grad_() for name, x in leaves.items()}

    def run_ours() -> torch.Tensor:
        return test_matrix_state.scan("triton", **leaves)["y"]

    def run_theirs() -> torch.Tensor:
        log_retention = leaves["log_retention"]
        write = -torch.expm1(log_retention)[..., None]
        given = {"q": leaves["q"], "k": leaves["v"], "v": write * leaves["k"]}
        return simple_gla.chunk_simple_gla(**given, g=log_retention, scale=1.0)[0]

    assert error(run_theirs(), run_ours()) <= 1e-2  # it may multiply in TF32
    for name, run in (("ours", run_ours), ("flash-linear-attention", run_theirs)):
        for _round in range(2):  # the first compiles
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(10):
                torch.autograd.grad(run().sum(), [*leaves.values()])
            torch.cuda.synchronize()
            seconds = (time.perf_counter() - start) / 10
        with capsys.disabled():
            sys.stdout.write(f"\n{name}: {1000 * seconds:.3f} ms forward and backward")


@pytest.mark.parametrize(
    ("change", "message"),
    [({"rule": "delta"}, "no delta rule"), ({"sizes": (1, 1, 129)}, "N up to 128, not 129")],
)
def test_matrix_state_refuses(change: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        test_matrix_state.scan("triton", **test_matrix_state.draw_leaves(2, **change))


def test_slots_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="holds no 600 slots"):
        test_slots.run(
            "triton", **test_slots.draw_leaves(1, torch.float32, num_slots=600, key_size=32)
        )
    inputs = test_selective_slots.draw(1, 2, seed=0)
    with pytest.raises(InputError, match="4096 places, and this takes 5000"):
        scan_selective_slots(*inputs, initial=empty_selective_slots(1, 5000, 100), backend="triton")


def test_a_missing_package_or_device_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="runs on a CUDA device, not on meta"):
        backends.require_triton(torch.device("meta"))
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs Triton; pip install 'unimatrix-lm\[gpu\]'"):
        backends.require_triton(torch.device("cpu"))


def test_without_a_gpu_nothing_of_it_is_imported() -> None:
    code = (
        "import sys, torch\n"
        "from unimatrix.configuration import UniMatrixConfig\n"
        "from unimatrix.modeling import UniMatrixForCausalLM\n"
        "model = UniMatrixForCausalLM(UniMatrixConfig.preset('unimatrix', num_hidden_layers=1))\n"
        "model(torch.zeros(1, 5, dtype=torch.int64))\n"
        "ours = [name for name in sys.modules if 'unimatrix' in name and 'triton' in name]\n"
        "assert not ours and 'fla' not in sys.modules, ours\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
