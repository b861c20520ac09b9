"""Cells are run once, resumed exactly, and refuse to be something else."""

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from transformers import TrainerCallback

from tests.byte_models import quiet_transformers
from tests.locks import hold_elsewhere
from tests.studies.compare.small import MODELS, make_comparison, write_corpus
from unimatrix.data import WindowDataset
from unimatrix.errors import InputError
from unimatrix.evaluation.bits_per_byte import measure_bits_per_byte
from unimatrix.evaluation.byte_costs import measure_byte_costs
from unimatrix.evaluation.compressors import xz_bits_per_byte
from unimatrix.inference.suffix_matches import match_stream
from unimatrix.modeling import UniMatrixForCausalLM
from unimatrix.studies.compare import cells, trained_cell
from unimatrix.studies.compare.cells import (
    average_by_position,
    build_text_cell,
    choose_learning_rate,
)
from unimatrix.studies.compare.models import plan_models
from unimatrix.studies.compare.recipe import choose_models
from unimatrix.studies.compare.run import count_cells, run_comparison
from unimatrix.studies.compare.texts import open_text
from unimatrix.studies.engine import Attempt, FolderStore, StoppedError, run_cell
from unimatrix.train.plan import StepPlan
from unimatrix.train.run_folder import CHECKPOINT_FOLDER

LATER = ("started", "train_s", "tokens_per_s", "eval_s")


class StopAfter(TrainerCallback):
    """Stop after a step, as Ctrl-C does."""

    def __init__(self, optim_step: int) -> None:
        self.optim_step = optim_step

    def on_step_end(self, args: Any, state: Any, control: Any, **_unused: Any) -> None:
        if state.global_step == self.optim_step:
            control.should_save = control.should_training_stop = True


@pytest.fixture
def planned(monkeypatch):
    """Plan four steps at once, whatever the machine."""
    plan = StepPlan(num_steps=4, seconds_per_step=0.01, num_threads=1)
    monkeypatch.setattr(trained_cell, "plan_steps", lambda *_, **__: plan)


def strip(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record without what time decides."""
    kept = {key: value for key, value in record.items() if key not in LATER}
    if isinstance(kept.get("results"), dict):
        kept["results"] = {k: v for k, v in kept["results"].items() if k not in LATER}
    return kept


def test_a_comparison_from_beginning_to_end(tmp_path, planned) -> None:
    corpus = write_corpus(tmp_path / "words")
    comparison, said = make_comparison(corpus), []
    records = run_comparison(comparison, tmp_path / "out", say=said.append)
    assert len(said) == len(records) == count_cells(comparison) == 1 + 2 * (2 + 2 + 1)
    assert said[-1] == "recall/theirs (1 left)"
    assert all(record["status"] == "done" for record in records.values())

    theirs = records["parameters/words/theirs"]
    assert theirs["num_optim_steps"] == 3
    assert theirs["tokens"] == 3 * 4 * 16
    assert len(theirs["loss_curve"]) == 3
    results = theirs["results"]
    assert (results["valid_bytes"], results["test_bytes"]) == (300, 300)
    assert results["context"] == "windows of 16, half overlapping"
    # Keys and values of one layer, as wide as the stream.
    width = theirs["asked"]["size"]["hidden_size"]
    assert results["state_bytes"]["65536"] == 2 * 65_536 * width * 4
    assert records["time/words/theirs"]["num_optim_steps"] == 4
    assert records["time/words/ours"]["results"]["context"] == "carried"
    trials = [records[f"sweep/ours/lr-{rate}"] for rate in ("0.001", "0.003")]
    chosen = records["parameters/words/ours"]["asked"]["learning_rate"]
    assert chosen == choose_learning_rate(trials)
    recall = records["recall/ours"]["results"]
    assert list(recall["accuracy_by_pairs"]) == ["4", "8"]
    assert list(recall["accuracy_by_tokens"]) == ["128", "256"]
    text = (corpus / "valid" / "text.txt").read_bytes()[:300]
    xz = records["compressors/words"]["results"]["xz -9e"]["valid"]
    assert xz["plain"] == xz_bits_per_byte(text)
    assert xz["primed"] < xz["plain"]


def test_a_carried_automaton_reads_the_training_text_before_every_window_and_first(
    tmp_path, planned
) -> None:
    corpus = write_corpus(tmp_path / "words")
    models = {"ours": {**MODELS["ours"], "carried_automaton": True}, "theirs": MODELS["theirs"]}
    comparison = make_comparison(corpus, models=models, tables=["time"])
    records = run_comparison(comparison, tmp_path / "out")
    assert len(records) == count_cells(comparison) == 1 + 2 * (2 + 1)
    (maker,) = plan_models(choose_models(comparison, ["ours"]))
    text = open_text(str(corpus))
    cell = build_text_cell(maker, "time", text, 1e-3)
    assert cell.settings["carried_automaton"] is True
    train = text.corpus.train
    matches = match_stream(train, maker.automaton_window)
    for index, window in enumerate(WindowDataset(train, 16, 3, comparison.seed, matches=matches)):
        found = cell.make_dataset(3)[index]["suffix_match"]
        assert (found == window["suffix_match"]).all()
        assert (found[1:, 1] > 16).any(), "no match reaches beyond its window"

    results = records["time/words/ours"]["results"]
    assert results["context"] == f"carried, after {len(train):,} bytes"
    model = UniMatrixForCausalLM.from_pretrained(tmp_path / "out/time/words/ours")
    valid = measure_bits_per_byte(model, text.corpus.valid, limit_bytes=300, prime=train)
    assert results["valid_bits_per_byte"] == pytest.approx(valid.bits_per_byte, abs=1e-6)
    theirs = records["time/words/theirs"]
    assert "carried_automaton" not in theirs["asked"]
    assert theirs["results"]["context"] == "windows of 16, half overlapping"


def test_a_carried_automaton_needs_one(tmp_path) -> None:
    models = {"ours": {"preset": "core", "carried_automaton": True}}
    with pytest.raises(InputError, match=r"'ours' has no suffix automaton.*'none'"):
        plan_models(make_comparison(write_corpus(tmp_path / "words"), models=models))


def test_finished_cells_are_read_back(tmp_path, planned, monkeypatch) -> None:
    corpus = write_corpus(tmp_path / "words")
    comparison = choose_models(make_comparison(corpus, tables=["parameters"]), ["theirs"])
    first = run_comparison(comparison, tmp_path / "out")
    monkeypatch.setattr(trained_cell, "train_model", None)
    monkeypatch.setattr(cells, "measure_compressors", None)
    assert run_comparison(comparison, tmp_path / "out") == first
    with hold_elsewhere(tmp_path / "out"), pytest.raises(InputError, match="is in use"):
        run_comparison(comparison, tmp_path / "out")


def test_the_weights_kept_are_those_judged(tmp_path, planned) -> None:
    corpus = write_corpus(tmp_path / "words")
    comparison = choose_models(make_comparison(corpus), ["theirs"])
    (maker,) = plan_models(comparison)
    text = open_text(str(corpus))
    cell = build_text_cell(maker, "parameters", text, 1e-3)
    record = run_cell(cell, FolderStore(tmp_path))
    assert not (tmp_path / cell.name / CHECKPOINT_FOLDER).exists()
    with quiet_transformers():
        model = type(maker.build_for_text()).from_pretrained(tmp_path / cell.name)
    again = measure_byte_costs(model, text.corpus.valid, window_tokens=16, limit_bytes=300)
    assert again.bits_per_byte == record["results"]["valid_bits_per_byte"]


@pytest.mark.parametrize("name", ["ours", "theirs"])
def test_an_interrupted_cell_continues_to_the_same_end(tmp_path, planned, name) -> None:
    corpus = write_corpus(tmp_path / "words")
    (maker,) = plan_models(choose_models(make_comparison(corpus), [name]))
    cell = build_text_cell(maker, "time", open_text(str(corpus)), 1e-3)
    unbroken = run_cell(cell, FolderStore(tmp_path / "one"))
    with pytest.raises(StoppedError, match=f"time/words/{name}"):
        run_cell(cell, FolderStore(tmp_path / "two"), Attempt(callbacks=[StopAfter(2)]))
    path = tmp_path / "two" / cell.name / "record.json"
    stopped = json.loads(path.read_text())
    assert (stopped["status"], stopped["num_optim_steps"]) == ("interrupted", 4)
    resumed = run_cell(cell, FolderStore(tmp_path / "two"))
    assert strip(resumed) == strip(unbroken)
    assert resumed["train_s"] > stopped["train_s"]


def test_a_stop_between_training_and_judging_trains_no_more(tmp_path, planned) -> None:
    corpus = write_corpus(tmp_path / "words")
    (maker,) = plan_models(choose_models(make_comparison(corpus), ["theirs"]))
    cell = build_text_cell(maker, "time", open_text(str(corpus)), 1e-3)
    unbroken = run_cell(cell, FolderStore(tmp_path / "one"))

    def fail(model: object) -> dict[str, Any]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_cell(replace(cell, judge=fail), FolderStore(tmp_path / "two"))
    resumed = run_cell(cell, FolderStore(tmp_path / "two"), Attempt(callbacks=[StopAfter(1)]))
    assert strip(resumed) == strip(unbroken)


def test_another_question_is_not_answered_with_an_old_cell(tmp_path, planned) -> None:
    corpus = write_corpus(tmp_path / "words")
    comparison = choose_models(make_comparison(corpus, tables=["time"]), ["theirs"])
    run_comparison(comparison, tmp_path / "out")
    longer = make_comparison(corpus, tables=["time"], seed=1)
    with pytest.raises(InputError, match=r"was made with another (size|seed|entry)"):
        run_comparison(choose_models(longer, ["theirs"]), tmp_path / "out")
    (corpus / "train" / "text.txt").write_text("changed " * 200)
    with pytest.raises(InputError, match="was made with another sha256; choose another --out"):
        run_comparison(comparison, tmp_path / "out")


def test_a_damaged_record_is_named(tmp_path, planned) -> None:
    corpus = write_corpus(tmp_path / "words")
    (maker,) = plan_models(choose_models(make_comparison(corpus), ["theirs"]))
    cell = build_text_cell(maker, "time", open_text(str(corpus)), 1e-3)
    (tmp_path / cell.name).mkdir(parents=True)
    (tmp_path / cell.name / "record.json").write_text("{")
    with pytest.raises(InputError, match=r"record.json is damaged .*; delete"):
        run_cell(cell, FolderStore(tmp_path))


def test_divergence_is_a_result(tmp_path, planned) -> None:
    corpus = write_corpus(tmp_path / "words")
    (maker,) = plan_models(choose_models(make_comparison(corpus), ["theirs"]))
    cell = build_text_cell(maker, "time", open_text(str(corpus)), 1e30)
    record = run_cell(cell, FolderStore(tmp_path))
    assert (record["status"], record["results"]) == ("failed", None)
    assert "not finite" in record["error"]
    assert run_cell(cell, FolderStore(tmp_path)) == record
    with pytest.raises(InputError, match="theirs diverged at every learning rate"):
        choose_learning_rate([record])


def test_positions_are_averaged_in_doubling_bins() -> None:
    nats = np.arange(1000, dtype=np.float32) * math.log(2)
    assert average_by_position(nats) == [
        [128, 63.5],
        [256, 191.5],
        [512, 383.5],
        [1000, 755.5],
    ]
    assert average_by_position(nats[:5]) == [[5, 2.0]]


def test_corpora_of_one_name(tmp_path) -> None:
    one, other = write_corpus(tmp_path / "a" / "words"), write_corpus(tmp_path / "b" / "words")
    comparison = make_comparison(one, sweep={"corpus": str(other)})
    with pytest.raises(InputError, match="would share the name 'words'"):
        run_comparison(comparison, tmp_path / "out")
    assert not (tmp_path / "out").exists()
