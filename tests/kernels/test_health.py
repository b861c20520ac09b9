"""Kernels are checked once before ``auto`` chooses them; where they fail, all runs without."""

import inspect
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.models import build_model, draw_ids
from unimatrix.ops import backends, matrix_state, selective_slots, slots
from unimatrix.ops.numba import health, self_check, team, threads
from unimatrix.ops.numba.health import explain_unusable
from unimatrix.ops.selective_slots.keys import hash_contexts
from unimatrix.ops.suffix_automaton import predict_from_suffix

CPU = torch.device("cpu")

PRESETS = ("core", "sparsepointer", "unimatrix")


@pytest.fixture(autouse=True)
def _fresh_check() -> Iterator[None]:
    """Let every test be the first of a process that asks."""
    explain_unusable.cache_clear()
    yield
    explain_unusable.cache_clear()


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the check fail, and every kernel that runs for all that."""

    def refuse(*_: Any) -> None:
        raise AssertionError("a kernel ran")

    monkeypatch.setattr(backends, "explain_unusable", lambda: "RuntimeError: broken")
    for name in ("run_in_team", "_run_in_pool"):
        monkeypatch.setattr(threads, name, refuse)


def test_kernels_run_here_and_are_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert explain_unusable() is None
    monkeypatch.setattr(health, "_run_self_check", None)
    assert explain_unusable() is None


def test_modes_of_the_thread_that_asks_do_not_reach_the_check() -> None:
    modes = (
        torch.device("meta"),
        torch.autocast("cpu", dtype=torch.bfloat16),
        torch._subclasses.FakeTensorMode(),
    )
    for mode in modes:
        explain_unusable.cache_clear()
        with mode:
            assert explain_unusable() is None


def compute_nothing(*_: Any) -> None:
    """Leave the table as it was."""


@pytest.mark.parametrize(
    ("module", "name", "substitute", "reason"),
    [
        (self_check, "map_rows", compute_nothing, "RuntimeError: a kernel whose results are known"),
        (team, "_ARRAY", ("data", "shape"), "RuntimeError: Numba lays an array out in another way"),
        (team, "_MOST_NUMBERS", 40, "RuntimeError: Numba compiled _fill_rows for 42 numbers"),
    ],
)
def test_what_fails_is_said_once(
    module: Any,
    name: str,
    substitute: object,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if module is team and threads.find_libgomp() is None:
        pytest.skip("Numba itself passes the arguments here")
    monkeypatch.setattr(module, name, substitute)
    monkeypatch.setattr(team, "_entries", {})
    assert str(explain_unusable()).startswith(reason)
    assert str(explain_unusable()).startswith(reason)
    (record,) = caplog.records
    assert record.name == "unimatrix"
    assert record.levelname == "WARNING"
    assert f"unimatrix runs without its compiled kernels, several times slower: {reason}" in (
        record.message.replace("they do not work with what is installed here (", "")
    )
    assert "pip install --upgrade numba numpy" in record.message


def test_auto_chooses_other_back_ends(without_kernels: None) -> None:
    assert matrix_state.choose_backend(8, CPU) == "parallel"
    assert matrix_state.choose_backend(8, CPU, norm_guard=True) == "reference"
    assert slots.choose_backend(CPU, 8) == "parallel"
    assert selective_slots.choose_backend(CPU, 8) == "reference"


def test_whole_numbers_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = draw_ids(3, 40)
    patterns = [[0], [0, 2]]
    (predicted, _), (keys) = predict_from_suffix(ids), hash_contexts(ids, patterns)
    monkeypatch.setattr(backends, "explain_unusable", lambda: "RuntimeError: broken")
    (again, _), (others) = predict_from_suffix(ids), hash_contexts(ids, patterns)
    assert all(map(torch.equal, predicted, again))
    assert torch.equal(keys, others)


def run_preset(preset: str) -> dict[str, Any]:
    """Return loss, gradients and written tokens of a model as ``auto`` runs it."""
    model = build_model(preset, dtype=torch.float64)
    ids = draw_ids(2, 30)
    loss = model(ids, labels=ids).loss
    loss.backward()
    gradients = [p.grad.sum().item() for p in model.parameters() if p.grad is not None]
    mask = torch.ones_like(ids)
    written = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    return {"loss": loss.item(), "gradients": gradients, "written": written.tolist()}


def test_a_process_without_numba_computes_the_same() -> None:
    lines = (
        "import json, sys",
        'sys.modules["numba"] = None  # as if it were not installed',
        "import torch",
        "from tests.models import build_model, draw_ids",
        inspect.getsource(run_preset).replace("dict[str, Any]", "dict"),
        f"print(json.dumps([run_preset(preset) for preset in {PRESETS}]))",
    )
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("unimatrix runs without its compiled kernels") == 1
    assert "(ModuleNotFoundError: import of numba halted" in done.stderr
    for preset, found in zip(PRESETS, json.loads(done.stdout), strict=True):
        expected = run_preset(preset)
        assert found["written"] == expected["written"]
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-10)
        assert found["gradients"] == pytest.approx(expected["gradients"], rel=1e-9)
