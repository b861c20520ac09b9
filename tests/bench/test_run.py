"""A whole run at tiny sizes."""

from dataclasses import replace

import pytest
import torch

from unimatrix.bench import run as module
from unimatrix.bench.models import BenchModel
from unimatrix.bench.plan import BenchPlan
from unimatrix.bench.probe import Probe
from unimatrix.bench.run import run_bench

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8}


def make_plan(modes: list[str], names: list[str], lengths: list[int], **fields) -> BenchPlan:
    return BenchPlan(
        modes=modes,
        lengths=lengths,
        models=[BenchModel(name=name, overrides=SMALL) for name in names],
        **{
            "batch_size": None,
            "num_rounds": 2,
            "budget_s": 100.0,
            "seed": 0,
            "device": "cpu",
            "num_threads": 1,
        }
        | fields,
    )


def fake_probe(cell, setting) -> Probe:
    """Return what a process of its own would, without one."""
    if cell.model.name == "llama" and cell.num_tokens > 16:
        return Probe(failure="one run took longer than 1 s")
    return Probe(run_s=1e-3, peak_bytes=1000, state_bytes=cell.num_tokens)


def test_rows_of_two_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "probe", fake_probe)
    shown = []
    plan = make_plan(["train", "step"], ["core", "llama"], [8, 32, 64], batch_size=2)
    result = run_bench(plan, lambda text, done: shown.append(done))
    rows = {(r["mode"], r["model"], r["num_tokens"]): r for r in result["rows"]}
    assert len(rows) == len(result["rows"]) == 12
    assert sorted(shown) == shown
    assert shown[-1] == 12

    row = rows["train", "core", 8]
    assert row["batch_size"] == 2
    assert row["rounds"] == 2
    assert row["fastest_ms"] <= row["median_ms"] <= row["slowest_ms"]
    assert row["tokens_per_s"] == pytest.approx(16 / (row["median_ms"] / 1e3))
    assert row["ratio_to_llama"] > 0
    assert row["ratio_to_shortest"] is None
    assert row["peak_share"] == pytest.approx(row["floor_ms"] / row["median_ms"])
    seconds = 2 * row["multiply_adds"] / result["matmul_peak_flops_per_s"]
    assert row["floor_ms"] == pytest.approx(1e3 * seconds)
    assert (row["peak_bytes"], row["state_bytes"]) == (1000, 8)
    assert rows["train", "llama", 8]["ratio_to_llama"] == 1.0

    # What is too slow is shown with its reason, and not tried at more tokens.
    assert rows["train", "llama", 32]["skipped"] == "one run took longer than 1 s"
    assert rows["train", "llama", 64]["skipped"] == "not tried: it failed at 32 tokens"
    assert "median_ms" not in rows["train", "llama", 64]
    assert rows["train", "core", 64]["ratio_to_llama"] is None

    step = rows["step", "core", 32]
    assert step["batch_size"] == 1
    assert step["tokens_per_s"] == pytest.approx(1e3 / step["median_ms"])
    assert step["ratio_to_shortest"] > 0
    assert rows["step", "core", 8]["ratio_to_shortest"] == 1.0

    assert [check["op"] for check in result["checks"]] == [
        "matrix_state",
        "fused_passes",
        "decoding",
    ]
    assert [model["name"] for model in result["models"]] == ["core", "llama"]
    assert (result["dtype"], result["copy_peak_bytes_per_s"]) == ("float32", None)


def test_bytes_have_a_floor_where_copies_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "probe", fake_probe)

    class Fixed:
        flops_per_s, bytes_per_s = 1e9, 1e6

        def __init__(self, *_: object, **__: object) -> None:
            pass

        def sample(self) -> None:
            pass

    monkeypatch.setattr(module, "Ceilings", Fixed)
    result = run_bench(make_plan(["train", "step"], ["core"], [8]))
    train, step = result["rows"]
    assert train["bytes_floor_ms"] == pytest.approx(2.0)  # 1,000 bytes written and read
    assert train["bandwidth_share"] == pytest.approx(2.0 / train["median_ms"])
    assert "bandwidth_share" not in step
    assert result["copy_peak_bytes_per_s"] == 1e6


def test_a_model_without_room_beside_the_others_is_skipped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "probe", fake_probe)
    plan = make_plan(["train"], ["core", "llama"], [8])
    build = module.MODES["train"].build

    def run_out(_: object) -> None:
        raise torch.OutOfMemoryError

    def build_large(spec, model, ids):
        workload = build(spec, model, ids)
        return workload._replace(run=run_out) if spec.name == "llama" else workload

    train = module.MODES["train"]._replace(build=build_large)
    monkeypatch.setattr(module, "MODES", {**module.MODES, "train": train})
    ours, theirs = run_bench(plan)["rows"]
    assert theirs["skipped"] == "the device has no room for it beside the others"
    assert ours["skipped"] is None
    assert ours["ratio_to_llama"] is None


def test_compiled_steps_stand_beside_eager_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "probe", fake_probe)
    plan = make_plan(["train", "forward"], ["core", "llama"], [8, 12])
    compiled = BenchModel(name="core", overrides=SMALL, compiler="aot_eager")
    result = run_bench(replace(plan, models=[*plan.models, compiled]))
    rows = [(row["mode"], row["model"], row["num_tokens"]) for row in result["rows"]]
    assert rows == [
        *(("train", name, n) for n in (8, 12) for name in ("core", "llama", "core, compiled")),
        *(("forward", name, n) for n in (8, 12) for name in ("core", "llama")),
    ]
    row = result["rows"][2]
    assert (row["skipped"], row["rounds"]) == (None, 2)
    assert row["ratio_to_llama"] > 0
    assert row["multiply_adds"] == result["rows"][0]["multiply_adds"]
    check = result["checks"][-1]
    assert (check["model"], check["op"], check["backend"]) == (
        "core, compiled",
        "train step",
        "aot_eager",
    )
    assert check["error"] < 1e-5


def test_rounds_fit_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    def probe_slowly(cell, setting) -> Probe:
        return Probe(run_s=4.0 if cell.model.name == "llama" else 1e-3)

    monkeypatch.setattr(module, "probe", probe_slowly)
    plan = make_plan(["forward"], ["core", "llama"], [8], num_rounds=5, budget_s=9.0)
    rounds = {row["model"]: row["rounds"] for row in run_bench(plan)["rows"]}
    assert rounds == {"core": 5, "llama": 2}


def test_a_run_with_processes_of_its_own() -> None:
    (row,) = run_bench(make_plan(["prefill"], ["core"], [24]))["rows"]
    assert row["skipped"] is None
    assert row["ratio_to_llama"] is None
    assert row["state_bytes"] == 2 * 2 * 8 * 8 * 4 + 3 * 8
