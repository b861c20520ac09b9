"""New processes up to their first tokens."""

import pytest

from unimatrix.bench import starts
from unimatrix.bench.models import BenchModel
from unimatrix.bench.plan import BenchPlan
from unimatrix.bench.starts import StartError, time_starts

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8}


def make_plan(*names: str, num_rounds: int = 1, budget_s: float = 60.0) -> BenchPlan:
    """Return a plan whose names may end in ", compiled"."""
    models = []
    for name in names:
        name, _, is_compiled = name.partition(", ")
        compiler = "aot_eager" if is_compiled else None
        models.append(BenchModel(name=name, overrides=SIZES, compiler=compiler))
    return BenchPlan(
        modes=[],
        alone=["start"],
        lengths=[8],
        models=models,
        batch_size=None,
        num_rounds=num_rounds,
        budget_s=budget_s,
        seed=0,
        device="cpu",
    )


def test_a_process_tells_when_its_tokens_came() -> None:
    """A model of another library, which has no kernels to compile."""
    (row,) = time_starts(make_plan("llama"))
    assert (row["model"], row["rounds"]) == ("llama", 1)
    assert row["libraries_s"] > 0
    assert 0 < row["fastest_s"] == row["first_token_s"] == row["slowest_s"]
    assert row["first_token_s"] < row["second_token_s"]
    assert 0 < row["first_ever_first_token_s"] < row["first_ever_second_token_s"]


def test_models_take_turns_each_with_kernels_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def run(command, kernels) -> dict[str, float]:
        seen.append((command[4], kernels.name))
        said = {"libraries": 2.0, "first": float(len(seen)), "second": len(seen) + 0.5}
        return said | {"whole": 4.0}

    monkeypatch.setattr(starts, "_run", run)
    ours, theirs = time_starts(make_plan("core", "core, compiled", "llama", num_rounds=3))
    mine = ("UniMatrixForCausalLM", "kernels of core")
    assert seen == 4 * [mine, ("LlamaForCausalLM", "kernels of llama")]
    assert (ours["first_ever_first_token_s"], theirs["first_ever_second_token_s"]) == (1.0, 2.5)
    assert (ours["first_token_s"], ours["fastest_s"], ours["slowest_s"]) == (5.0, 3.0, 7.0)
    assert (theirs["second_token_s"], theirs["libraries_s"]) == (6.5, 2.0)


def test_a_budget_is_kept_and_what_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"libraries": 2.0, "first": 1.0, "second": 1.5, "whole": 4.0}
    monkeypatch.setattr(starts, "_run", lambda command, kernels: said)
    ours, theirs = time_starts(make_plan("core", "gla", num_rounds=20, budget_s=9.0))
    assert (ours["skipped"], ours["rounds"]) == (None, 2)
    assert theirs["model"] == "gla"
    assert "CUDA device only" in theirs["skipped"]


def test_a_process_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan("llama")
    monkeypatch.setattr(starts, "_SCRIPT", "raise ValueError('no room')")
    with pytest.raises(StartError, match=r"could not generate: ValueError: no room"):
        time_starts(plan)
    monkeypatch.setattr(starts, "_SCRIPT", "import time; time.sleep(60)")
    monkeypatch.setattr(starts, "_LIMIT_S", 0.1)
    with pytest.raises(StartError, match=r"took longer than 0.1 s"):
        time_starts(plan)
