"""What is wrong is not timed."""

import pytest
import torch

from unimatrix.bench import equivalence
from unimatrix.bench.equivalence import LIMITS, EquivalenceError, check_compiled, check_model
from unimatrix.bench.models import BenchModel
from unimatrix.ops.matrix_state import fused_scan_native as projected_native

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8}


@pytest.mark.parametrize(
    ("name", "ops"),
    [
        ("core", ["matrix_state", "fused_passes", "decoding"]),
        ("sparsepointer", ["matrix_state", "slots", "fused_passes", "decoding"]),
        ("unimatrix", ["matrix_state", "indexed_attention", "fused_passes", "decoding"]),
        (
            "selective",
            ["matrix_state", "selective_slots", "suffix_automaton", "fused_passes", "decoding"],
        ),
    ],
)
def test_every_fast_path_of_a_preset_is_checked(name: str, ops: list[str]) -> None:
    checks = check_model(BenchModel(name=name, overrides=SMALL), seed=0, device="cpu")
    assert [check.op for check in checks] == ops
    assert all(0 <= check.error <= LIMITS[check.precision] for check in checks)


def test_the_precision_that_is_timed_is_checked_too() -> None:
    spec = BenchModel(name="unimatrix", overrides=SMALL, precision="bfloat16")
    checks = check_model(spec, seed=0, device="cpu")
    found = {(check.op, check.precision) for check in checks}
    assert {("matrix_state", "float32"), ("matrix_state", "bfloat16")} <= found
    assert ("decoding", "bfloat16") not in found
    assert all(0 <= check.error <= LIMITS[check.precision] for check in checks)


def test_a_compiled_step_is_checked_in_float32_as_well() -> None:
    spec = BenchModel(name="core", overrides=SMALL, compiler="aot_eager", precision="bfloat16")
    checks = check_compiled(spec, seed=0, device="cpu")
    assert [check.precision for check in checks] == ["float32", "bfloat16"]
    assert all(0 <= check.error <= LIMITS[check.precision] for check in checks)


def test_a_wrong_back_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    scan = projected_native.run_forward

    def scan_wrongly(*args, **options):
        y, *others = scan(*args, **options)
        return y * 1.01, *others

    monkeypatch.setattr(projected_native, "run_forward", scan_wrongly)
    with pytest.raises(EquivalenceError, match=r"core: matrix_state \(native\) differs from the"):
        check_model(BenchModel(name="core", overrides=SMALL), seed=0, device="cpu")


def test_a_wrong_compiled_step_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_wrongly(spec, model):
        def call(**options):
            output = model(**options)
            return output.__class__(loss=1.01 * output.loss)

        return call

    spec = BenchModel(name="core", overrides=SMALL, compiler="aot_eager")
    monkeypatch.setattr(equivalence, "compile_step", compile_wrongly)
    with pytest.raises(
        EquivalenceError, match=r"core, compiled: train step \(aot_eager\) differs from eager"
    ):
        check_compiled(spec, seed=0, device="cpu")


def test_wrong_decoding_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def forget(spec, model, token, carried):
        return carried

    monkeypatch.setattr(equivalence, "step_once", forget)
    with pytest.raises(
        EquivalenceError, match=r"core: decoding \(cache\) differs from a full pass"
    ):
        check_model(BenchModel(name="core", overrides=SMALL), seed=0, device="cpu")


def test_nan_is_an_error() -> None:
    nan = torch.tensor([float("nan")])
    assert equivalence._measure(nan, torch.ones(1)) == float("inf")
    assert equivalence._measure(torch.ones(1), torch.zeros(1)) == 1.0
