"""Every kind of run leaves one record, and is not run again."""

import json
from dataclasses import replace

import pytest

from tests.train.small_training import one_thread
from unimatrix.errors import InputError
from unimatrix.studies import engine
from unimatrix.studies.engine import StoppedError
from unimatrix.studies.reproduce import run
from unimatrix.studies.reproduce.claims import load_claims, name_run
from unimatrix.studies.reproduce.run import ReproductionPlan, count_parameters, reproduce
from unimatrix.studies.reproduce.throughput import measure_throughput
from unimatrix.train.callbacks import StopOnSignal

__all__ = ["one_thread"]

CELLS, CLAIMS = load_claims()
TEXT = "".join(f"line {i * i % 97} of many, much like the others\n" for i in range(900))


@pytest.fixture
def short(monkeypatch, tmp_path):
    """Make every run a few steps long, on a text of its own; return the plan."""
    recall = run.build_recipe
    monkeypatch.setattr(
        run,
        "build_recipe",
        lambda cell, seed: replace(recall(cell, seed), steps=2, batch_size=4, test_examples=8),
    )
    pilot = run.load_pilot

    def load_short(*arguments):
        recipe = pilot(*arguments)
        return replace(
            recipe,
            train=replace(recipe.train, steps=2, batch_size=2),
            eval=replace(recipe.eval, prefix_bytes=512),
        )

    monkeypatch.setattr(run, "load_pilot", load_short)
    monkeypatch.setattr(run, "_STAGE_STEPS", 1)
    monkeypatch.setattr(run, "_TRIPLE_EXAMPLES", 4)
    monkeypatch.setattr(
        run, "measure_throughput", lambda seed: measure_throughput(seed, num_rounds=1)
    )
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return ReproductionPlan(groups=("lm",), quick=True, data=(str(path),))


def keep_cells(monkeypatch, *folders: str) -> None:
    """Leave only some cells in the plan."""
    cells = [replace(CELLS[folder], seeds=CELLS[folder].seeds[:2]) for folder in folders]
    monkeypatch.setattr(run, "list_cells", lambda groups: cells)


@pytest.mark.parametrize(
    "folder",
    [
        "sizes",
        "pilot/transformer",
        "pilot/core",
        "recall/transformer",
        "recall/assoc",
        "slots/32-slots-no-pointer",
        "triple/transformer",
        "triple/unimatrix",
        "throughput",
    ],
)
def test_every_claim_of_a_run_is_in_its_record(monkeypatch, tmp_path, short, folder) -> None:
    keep_cells(monkeypatch, folder)
    records = reproduce(short, tmp_path / "out")
    (name,) = records
    assert name == name_run(CELLS[folder], CELLS[folder].seeds[0])
    kept = sorted(path.name for path in (tmp_path / "out" / name).iterdir())
    assert kept == ["record.json"]
    assert records[name]["seed"] == CELLS[folder].seeds[0]
    for claim in CLAIMS:
        if claim.cell == folder:
            value = records[name]["results"]
            for key in claim.metric.split("/"):
                value = value[key]
            assert value >= 0


def test_what_is_recorded_is_not_run_again(monkeypatch, tmp_path, short) -> None:
    keep_cells(monkeypatch, "recall/transformer")
    out, said = tmp_path / "out", []
    first = reproduce(short, out, say=said.append)
    assert said == ["recall/transformer/seed-19 (1 left)"]
    monkeypatch.setattr(engine, "train_model", None)
    assert reproduce(short, out, say=said.append) == first
    assert len(said) == 1


def test_seeds_differ_and_repeat(monkeypatch, tmp_path, short) -> None:
    keep_cells(monkeypatch, "pilot/transformer")
    plan = replace(short, quick=False)
    one, other = (reproduce(plan, tmp_path / name) for name in ("one", "other"))
    bits = [[r["results"]["bits_per_byte"] for r in records.values()] for records in (one, other)]
    assert bits[0] == bits[1]
    assert len(set(bits[0])) == 2


def test_an_interrupted_run_leaves_nothing(monkeypatch, tmp_path, short) -> None:
    keep_cells(monkeypatch, "pilot/core")
    request = StopOnSignal.__enter__

    def enter(self):
        stop = request(self)
        stop.requested = True
        return stop

    monkeypatch.setattr(StopOnSignal, "__enter__", enter)
    with pytest.raises(StoppedError, match="pilot/core/seed-7"):
        reproduce(short, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.json"))


def test_a_damaged_record_is_named(monkeypatch, tmp_path, short) -> None:
    keep_cells(monkeypatch, "sizes")
    path = tmp_path / "out" / "sizes" / "seed-0"
    path.mkdir(parents=True)
    (path / "record.json").write_text("{")
    with pytest.raises(InputError, match="is damaged"):
        reproduce(short, tmp_path / "out")
    (path / "record.json").write_text(json.dumps({"status": "interrupted"}))
    assert reproduce(short, tmp_path / "out")["sizes/seed-0"]["status"] == "done"


def test_a_missing_corpus_is_refused_before_anything_runs(monkeypatch, tmp_path, short) -> None:
    keep_cells(monkeypatch, "sizes", "pilot/core")
    with pytest.raises(InputError, match="'nowhere' is no file"):
        reproduce(replace(short, data=("nowhere",)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_sizes_are_the_published_ones() -> None:
    published = {
        claim.metric.partition("/")[2]: claim.published for claim in CLAIMS if claim.cell == "sizes"
    }
    assert count_parameters() == published
