import json
from dataclasses import asdict

import pytest

from tests.cli.command import assert_refused, run_command
from unimatrix.studies.recall.recipe import RecallRecipe

QUICK = ("--steps", 2, "--batch-size", 4, "--test-examples", 32)


@pytest.mark.parametrize(
    ("preset", "parameters"), [(None, 119_853), ("selective", 74_569), ("sparsepointer", 75_014)]
)
def test_json_and_progress(monkeypatch, tmp_path, preset, parameters) -> None:
    monkeypatch.chdir(tmp_path)
    options = () if preset is None else ("--preset", preset)
    answer = run_command("recall", *QUICK, *options, "--json")
    assert answer.exit_code == 0
    result = answer.result
    assert result["recipe"]["preset"] == (preset or "unimatrix")
    assert set(result["accuracy"]) == {"4", "6", "8"}
    assert result["parameters"] == parameters
    assert result["state_bytes"] > 0
    assert result["train_s"] > 0
    # The selective slots find the value before anything is learned; the others start from chance.
    assert answer.stderr.startswith(f"step 1 of 2  {'0.' if preset == 'selective' else '4.'}")
    assert answer.stderr.endswith("testing 4\ntesting 6\ntesting 8\n")
    assert list(tmp_path.iterdir()) == []


def test_flags_reach_the_recipe(tmp_path) -> None:
    flags = {
        "--preset": "sparsepointer",
        "--dropout": 0,
        "--slots": 8,
        "--pairs": 3,
        "--lr": 1e-3,
        "--weight-decay": 0,
        "--seed": 7,
        "--out": tmp_path / "run",
        "--set": "write_gate=false",
    }
    options = [part for pair in flags.items() for part in pair]
    result = run_command("recall", "associative", *QUICK, *options, "--json").result
    recipe = RecallRecipe(
        dropout=0.0,
        num_slots=8,
        num_pairs=3,
        learning_rate=1e-3,
        weight_decay=0.0,
        steps=2,
        batch_size=4,
        test_examples=32,
        seed=7,
        overrides={"write_gate": False},
    )
    assert result["recipe"] == json.loads(json.dumps(asdict(recipe)))
    assert result["parameters"] == 75_014 - (2 * 64 + 1)
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_text() -> None:
    text = run_command("recall", *QUICK, "--preset", "core").text
    assert text.startswith("associative recall: core, 2 steps of 4, dropout 0.1, seed 19\n")
    head, *rows = text.splitlines()[2:6]
    assert head.split()[:2] == ["test", "accuracy"]
    assert [row.split()[0] for row in rows] == ["4", "6", "8"]
    assert all(len(row.split()) == 5 for row in rows)
    assert "70,660 parameters" in text


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("assoc",), "Did you mean 'associative'?"),
        (("--preset", "core", "--slots", 8), "preset 'core' has no slots"),
        (("--preset", "cor"), "Did you mean 'core'?"),
        (("--pairs", 9), "num_pairs is 9"),
        (("--steps", 0), "steps is 0"),
        (("--lr", "nan"), "learning_rate is nan"),
        (("--dropout", 1), "dropout is 1.0"),
        (("--test-examples", 0), "test_examples is 0"),
        (("--set", "junk"), "'junk' sets nothing"),
        (("--set", "write_gatee=true"), "Did you mean 'write_gate'?"),
        (("--set", "write_gate=maybe"), "true or false"),
        (("--set", "preset=core"), "use --preset"),
        (("mqar-c",), "Did you mean"),
        (("mqar-a", "--preset", "sparsepointer"), "leave --preset out"),
        (("needle", "--preset", "core"), "leave --preset out"),
        (("--preset", "sparsepointer", "--test-slots", 4), "has no selective slots"),
        (("--test-slots", -1), "test_slots holds -1"),
        (("needle", "--test-slots", 0), "this task has none"),
        (("triple", "--test-slots", 3), "triple with preset 'selective' has no selective slots"),
        (("--preset", "core", "--test-tokens", 200), "an example has 200 tokens"),
        (("--test-tokens", 9), "window_tokens is 9, too short"),
        (("--set", "slot_key_patterns=[[0,0]]"), "none twice"),
        (("needle", "--test-window", 60), "window_bytes is 60, too short"),
        (("needle", "--data", "no-such-corpus"), "no-such-corpus"),
        (("--report", "report.txt"), "give it a name ending in .html"),
        (("--report", "full.html"), "is a folder"),
        (("--report", "file/report.html"), "cannot go into"),
        (("--out", "full.html"), "is not empty"),
    ],
)
def test_unusable_options_write_nothing(monkeypatch, tmp_path, options, sentence) -> None:
    (tmp_path / "full.html").mkdir()
    (tmp_path / "full.html" / "kept").touch()
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    out = () if "--out" in options else ("--out", "run")
    answer = run_command("recall", *options, *out)
    assert_refused(answer, sentence)
    assert "Traceback" not in answer.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full.html"]


def test_report(tmp_path) -> None:
    path = tmp_path / "new" / "recall.html"
    answer = run_command("recall", *QUICK, "--quick", "--report", path, "--json")
    assert answer.exit_code == 0
    assert "Associative recall" in path.read_text(encoding="utf-8")
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_another_task() -> None:
    text = run_command("recall", "noisy-keys", *QUICK, "--test-slots", 3).text
    assert text.startswith("noisy-keys recall: selective, 2 steps of 4")
    assert " in 3 slots" in text
