import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from tests.locks import hold_elsewhere
from tests.tasks.test_bindings import TEXT
from tests.train.small_training import (
    OVERRIDES,
    WINDOW_TOKENS,
    build_recipe,
    build_text,
    have_equal_weights,
    one_thread,
)
from unimatrix.data import load_corpus
from unimatrix.errors import InputError
from unimatrix.evaluation.bits_per_byte import measure_bits_per_byte
from unimatrix.evaluation.compressors import xz_bits_per_byte
from unimatrix.hub.load import load_model
from unimatrix.tasks import MixedWindows
from unimatrix.train.callbacks import NonFiniteError
from unimatrix.train.checkpoints import find_fault, find_last_checkpoint
from unimatrix.train.judge import judge_model, judge_run
from unimatrix.train.recipe import EvalSection, ModelSection, Recipe, load_recipe
from unimatrix.train.run import (
    TrainingRun,
    build_model,
    prepare_resumed_run,
    prepare_run,
    start_run,
    train_run,
)

__all__ = ["one_thread"]


class StopAfter(TrainerCallback):
    """Stop after a step, as Ctrl-C does."""

    def __init__(self, optim_step: int) -> None:
        self.optim_step = optim_step

    def on_step_end(self, args: Any, state: Any, control: Any, **_unused: Any) -> None:
        if state.global_step == self.optim_step:
            control.should_save = control.should_training_stop = True


def start(recipe: Recipe, out: Path | None) -> TrainingRun:
    run = prepare_run(recipe, out, "cpu")
    start_run(run, lambda _sentence: None)
    return run


def diverge(run: TrainingRun) -> None:
    with torch.no_grad():
        run.model.model.norm.weight.fill_(float("nan"))


class DivergeAfter(TrainerCallback):
    """Spoil the weights after a step."""

    def __init__(self, run: TrainingRun, optim_step: int) -> None:
        self.run, self.optim_step = run, optim_step

    def on_step_end(self, args: Any, state: Any, control: Any, **_unused: Any) -> None:
        if state.global_step == self.optim_step:
            diverge(self.run)


def read_record(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / "record.json").read_text())
    return record


def test_run_folder_is_a_model_with_its_history(tmp_path: Path) -> None:
    recipe, out = build_recipe(tmp_path), tmp_path / "run"
    run = start(recipe, out)
    assert read_record(out)["status"] == "training"
    assert not train_run(run).interrupted
    assert read_record(out)["status"] == "trained"
    result = judge_run(run)
    assert sorted(path.name for path in out.iterdir()) == [
        ".lock",
        "checkpoints",
        "config.json",
        "generation_config.json",
        "load_unimatrix.py",
        "metrics.jsonl",
        "model.safetensors",
        "recipe.json",
        "record.json",
        "tensorboard",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert load_recipe(out / "recipe.json") == recipe
    assert json.loads(json.dumps(result)) == result
    record = read_record(out)
    assert record["status"] == "done"
    assert record["results"]["bits_per_byte"] == result["bits_per_byte"]
    assert record["backends"] == {
        "matrix_state": "native",
        "suffix_automaton": "native",
        "fused_passes": "native",
    }
    assert record["num_optim_steps"] == 6
    corpus = load_corpus(recipe.data.data)
    assert record["corpus"]["sha256"] == corpus.sha256
    loaded = load_model(out)
    assert have_equal_weights(loaded.model, run.model)
    again = measure_bits_per_byte(loaded.model, corpus.valid, limit_bytes=200)
    assert again.bits_per_byte == pytest.approx(result["bits_per_byte"])
    assert result["xz_bits_per_byte"] == xz_bits_per_byte(corpus.valid.read(0, 200).tobytes())
    assert result["valid_bytes"] == 200
    assert result["tokens"] == 6 * 4 * WINDOW_TOKENS


def test_minutes_become_steps_that_a_resume_keeps(tmp_path: Path) -> None:
    recipe, out = build_recipe(tmp_path, steps=None, minutes=0.005), tmp_path / "run"
    sentences: list[str] = []
    run = prepare_run(recipe, out, "cpu")
    start_run(run, sentences.append)
    assert run.num_steps >= 1
    assert f"{run.num_steps:,} steps fit" in sentences[-1]
    assert read_record(out)["num_optim_steps"] == run.num_steps
    resumed = prepare_resumed_run(out, "cpu")
    assert (resumed.num_steps, resumed.recipe) == (run.num_steps, recipe)


def test_interrupted_run_is_resumed_and_judged(tmp_path: Path) -> None:
    recipe = build_recipe(tmp_path)
    unbroken = start(recipe, tmp_path / "unbroken")
    train_run(unbroken)
    out = tmp_path / "broken"
    assert train_run(start(recipe, out), callbacks=[StopAfter(2)]).interrupted
    assert read_record(out)["status"] == "interrupted"
    assert not (out / "model.safetensors").exists()
    resumed = prepare_resumed_run(out, "cpu")
    assert train_run(resumed).num_optim_steps == 6
    assert have_equal_weights(resumed.model, unbroken.model)
    # Killed while it was validating: nothing is left to train.
    judged = prepare_resumed_run(out, "cpu")
    train_run(judged)
    assert judge_run(judged)["bits_per_byte"] == judge_run(unbroken)["bits_per_byte"]
    with pytest.raises(InputError, match="is finished after 6 steps"):
        prepare_resumed_run(out, "cpu")


def test_run_killed_before_its_first_checkpoint_starts_over(tmp_path: Path) -> None:
    recipe = build_recipe(tmp_path)
    unbroken = start(recipe, tmp_path / "unbroken")
    train_run(unbroken)
    assert start(recipe, tmp_path / "killed").record["hardware"]["num_threads"] == 1
    torch.set_num_threads(2)
    resumed = prepare_resumed_run(tmp_path / "killed", "cpu")
    assert torch.get_num_threads() == 1
    train_run(resumed)
    assert have_equal_weights(resumed.model, unbroken.model)


def test_resume_refuses_other_text(tmp_path: Path) -> None:
    recipe, out = build_recipe(tmp_path), tmp_path / "run"
    start(recipe, out)
    (tmp_path / "corpus.txt").write_bytes(build_text()[::-1])
    with pytest.raises(InputError, match="has changed since"):
        prepare_resumed_run(out, "cpu")


def test_diverged_run_says_so(tmp_path: Path) -> None:
    recipe, out = build_recipe(tmp_path), tmp_path / "run"
    run = start(recipe, out)
    diverge(run)
    with pytest.raises(NonFiniteError, match=r"optimiser step 1;.*; there is no checkpoint before"):
        train_run(run)
    record = read_record(out)
    assert record["status"] == "failed"
    assert "optimiser step 1" in record["error"]


def test_diverged_run_names_the_checkpoint_that_is_kept(tmp_path: Path) -> None:
    recipe = build_recipe(tmp_path, save_every_steps=2)
    run = start(recipe, tmp_path / "run")
    with pytest.raises(NonFiniteError, match=r"step 4;.*/checkpoint-2 is kept$"):
        train_run(run, callbacks=[DivergeAfter(run, 3)])
    assert read_record(tmp_path / "run")["error"].endswith("/checkpoint-2 is kept")


def test_a_run_whose_last_checkpoint_is_not_whole_goes_on_from_the_one_before(
    tmp_path: Path,
) -> None:
    recipe, out = build_recipe(tmp_path, save_every_steps=2), tmp_path / "run"
    unbroken = start(recipe, tmp_path / "unbroken")
    train_run(unbroken)
    train_run(start(recipe, out), callbacks=[StopAfter(4)])
    (out / "checkpoints" / "checkpoint-4" / "optimizer.pt").unlink()
    resumed, said = prepare_resumed_run(out, "cpu"), list[str]()
    train_run(resumed, say=said.append)
    assert said == [
        "not whole: checkpoint-4 (optimizer.pt is missing); going on from checkpoint-2",
        f"training 6 steps on {resumed.corpus.name} into {out}, continuing checkpoint 2",
    ]
    assert have_equal_weights(resumed.model, unbroken.model)
    # The one that was not whole has been replaced.
    last = find_last_checkpoint(out)
    assert last is not None
    assert last.name == "checkpoint-6"
    assert find_fault(last.with_name("checkpoint-4"), 4) is None


def test_going_on_with_another_number_of_processes_is_said(tmp_path: Path) -> None:
    recipe, out = build_recipe(tmp_path), tmp_path / "run"
    train_run(start(recipe, out), callbacks=[StopAfter(2)])
    last = out / "checkpoints" / "checkpoint-2"
    (last / "rng_state_1.pth").write_bytes((last / "rng_state.pth").read_bytes())
    (last / "rng_state.pth").rename(last / "rng_state_0.pth")
    said: list[str] = []
    train_run(prepare_resumed_run(out, "cpu"), say=said.append)
    assert said[1:] == [
        f"{last} is of 2 process(es), and 1 go on: dropout draws other numbers than in an unbroken "
        "run"
    ]


def test_a_run_without_a_whole_checkpoint_is_refused_and_left_alone(tmp_path: Path) -> None:
    recipe, out = build_recipe(tmp_path), tmp_path / "run"
    train_run(start(recipe, out), callbacks=[StopAfter(2)])
    for path in (out / "checkpoints").iterdir():
        (path / "trainer_state.json").write_text("")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=r"is whole: checkpoint-2 \(trainer_state.json is damaged"):
        train_run(prepare_resumed_run(out, "cpu"))
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_a_run_in_use_is_not_resumed(tmp_path: Path) -> None:
    recipe, out = build_recipe(tmp_path), tmp_path / "run"
    start(recipe, out)
    resumed = prepare_resumed_run(out, "cpu")
    with hold_elsewhere(out):
        with pytest.raises(InputError, match="is in use"):
            train_run(resumed)
        with pytest.raises(InputError, match=r"is in use.*; choose another --out") as refused:
            prepare_run(recipe, out, "cpu")
        assert "--resume" not in str(refused.value)
    train_run(resumed)
    judge_run(resumed)
    with pytest.raises(InputError, match="please choose another --out"):
        prepare_run(recipe, out, "cpu")


@pytest.mark.parametrize("name", ["config.json", "recipe.json", "record.json"])
def test_a_damaged_run_is_refused_with_a_sentence(tmp_path: Path, name: str) -> None:
    recipe, out = build_recipe(tmp_path), tmp_path / "run"
    start(recipe, out)
    (out / name).write_text("{")
    with pytest.raises(InputError, match=name):
        prepare_resumed_run(out, "cpu")


@pytest.mark.parametrize(
    ("section", "fields", "message"),
    [
        ("data", {"data": ("missing.txt",)}, "missing.txt"),
        ("data", {"window_tokens": 10**6}, "too few"),
        ("data", {"carried_automaton": True}, "no suffix automaton"),
        ("data", {"documents": "packed"}, "is one document, which nothing could be packed with"),
        ("eval", {"prime_bytes": 9}, "eval.prime_bytes is 9 and the model has a position table"),
        ("train", {"batch_size": 5, "accumulation_steps": 2}, "multiple of 2"),
        ("train", {"steps": None}, "no training budget"),
        ("model", {"preset": "cor"}, "Did you mean 'core'"),
        ("model", {"overrides": {"max_position_embeddings": 8}}, "position table has 8 rows"),
        ("model", {"overrides": {"vocab_size": 300, "eos_token_id": 3}}, "bytes"),
        ("model", {"preset": None, "init": "nowhere", "overrides": {}}, "nowhere"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    tmp_path: Path, section: str, fields: dict[str, Any], message: str
) -> None:
    recipe = build_recipe(tmp_path)
    if {"carried_automaton", "prime_bytes"} & fields.keys():
        recipe = replace(recipe, model=ModelSection(preset="core"))
    wrong = replace(recipe, **{section: replace(getattr(recipe, section), **fields)})
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=message):
        prepare_run(wrong, tmp_path / "run", "cpu")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("carried_automaton", [False, True])
def test_a_window_remembers_what_the_recipe_says(tmp_path: Path, carried_automaton: bool) -> None:
    recipe = build_recipe(tmp_path)
    recipe = replace(recipe, data=replace(recipe.data, carried_automaton=carried_automaton))
    run = start(recipe, tmp_path / "run")
    item = run.cut_windows(8)[7]
    assert ("suffix_match" in item) == carried_automaton
    if carried_automaton:
        # In a text of four words, some of them repeated before any window begins.
        assert (item["suffix_match"][1:, 1] > WINDOW_TOKENS // 2).any()
    train_run(run)
    assert judge_run(run)["bits_per_byte"] < 8.5


def test_packed_documents_are_read_apart(tmp_path: Path) -> None:
    """Every step's loss is that of each document in a row of its own."""
    files = tmp_path / "files"
    files.mkdir()
    for i in range(20):
        (files / f"{i}.txt").write_bytes(build_text()[40 * i :][: 5 + 3 * i])
    recipe = build_recipe(tmp_path)
    data = replace(recipe.data, data=(str(files),), documents="packed")
    compiled = replace(recipe, data=data, train=replace(recipe.train, compile=True))
    with pytest.raises(InputError, match=r"train\.compile is true and data.documents is 'packed'"):
        prepare_run(compiled, tmp_path / "run", "cpu")
    run = start(replace(recipe, data=data), tmp_path / "run")
    items = run.cut_windows(8).__getitems__(range(8))
    assert any((item["position_ids"][1:] == 0).any() for item in items)
    batch = {name: torch.stack([item[name] for item in items]) for name in items[0]}
    model = run.model.eval()
    with torch.no_grad():
        found = model(**batch, loss_only=True).loss
        total, count = 0.0, 0
        for item in items:
            borders = [*(item["position_ids"] == 0).nonzero().flatten().tolist(), WINDOW_TOKENS]
            for first, stop in itertools.pairwise(borders):
                ids, labels = (item[n][None, first:stop] for n in ("input_ids", "shift_labels"))
                count += int((labels != -100).sum())
                total += float(model(ids, shift_labels=labels, num_items_in_batch=1).loss)
    assert float(found) == pytest.approx(total / count, rel=1e-5)
    result = train_run(run)
    assert result.loss_nats < float(found)


def test_init_starts_from_saved_weights(tmp_path: Path) -> None:
    recipe = build_recipe(tmp_path)
    first = start(recipe, tmp_path / "first")
    train_run(first)
    tuned = prepare_run(
        replace(recipe, model=ModelSection(preset=None, init=str(tmp_path / "first"))), None, "cpu"
    )
    assert have_equal_weights(tuned.model, first.model)
    assert tuned.model.config.dropout == OVERRIDES["dropout"]


def test_model_depends_on_its_seed_alone() -> None:
    section = ModelSection(preset="core", overrides=OVERRIDES)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one, other = build_model(section, 3), build_model(section, 4)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert have_equal_weights(build_model(section, 3), one)
    assert not have_equal_weights(other, one)


def test_protocols_of_validation(tmp_path: Path) -> None:
    recipe = build_recipe(tmp_path)
    corpus = load_corpus(recipe.data.data)
    model = build_model(recipe.model, 0)
    carried = judge_model(model, corpus, EvalSection(prefix_bytes=100), WINDOW_TOKENS)
    assert (carried.bytes, carried.context) == (100, "carried")
    settings = EvalSection(prefix_bytes=100, prime_bytes=300)
    primed = judge_model(model, corpus, settings, WINDOW_TOKENS)
    assert (primed.bytes, primed.context) == (100, "carried, after 300 bytes")
    first = corpus.train.slice(len(corpus.train) - 300, len(corpus.train), name="first")
    expected = measure_bits_per_byte(model, corpus.valid, limit_bytes=100, prime=first)
    assert primed == expected != carried
    windows = judge_model(
        model, corpus, EvalSection(protocol="windows", prefix_bytes=100), WINDOW_TOKENS
    )
    assert windows.bytes == 100 // WINDOW_TOKENS * WINDOW_TOKENS
    assert windows.context == f"consecutive windows of {WINDOW_TOKENS}"


def test_a_share_of_the_windows_are_documents(tmp_path: Path) -> None:
    recipe = build_recipe(tmp_path, steps=2)
    shared = replace(recipe, data=replace(recipe.data, document_share=0.5, window_tokens=128))
    with pytest.raises(InputError, match=r"the text has \d words for names; give more text"):
        prepare_run(shared, None, "cpu")
    (tmp_path / "corpus.txt").write_bytes(TEXT.tobytes())
    run = start(shared, tmp_path / "run")
    windows = run.cut_windows(8)
    assert isinstance(windows, MixedWindows)
    assert windows.share == 0.5
    assert len(windows) == 8
    train_run(run)
    assert judge_run(run)["document_share"] == 0.5
    plain = replace(recipe, data=replace(recipe.data, document_share=0.0))
    assert not isinstance(start(plain, tmp_path / "plain").cut_windows(8), MixedWindows)


def test_a_reader_is_asked_after_training(tmp_path: Path) -> None:
    recipe = build_recipe(tmp_path, steps=2)
    recipe = replace(recipe, eval=replace(recipe.eval, questions=8))
    with pytest.raises(InputError, match=r"eval.questions is 8 and the model keeps no index"):
        prepare_run(recipe, None, "cpu")
    model = replace(
        recipe.model,
        overrides=OVERRIDES | {"associative_memory": "indexed", "automaton_window": 512},
    )
    with pytest.raises(InputError, match=r"words for names; give more text"):
        prepare_run(replace(recipe, model=model), None, "cpu")
    (tmp_path / "corpus.txt").write_bytes(TEXT.tobytes())
    run = start(replace(recipe, model=model), tmp_path / "run")
    train_run(run)
    answers = judge_run(run)["answers"]
    assert list(answers) == ["grammar", "unseen"]
    assert read_record(tmp_path / "run")["results"]["answers"] == answers
