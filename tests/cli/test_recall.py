import pytest

from tests.cli.command import assert_refused, run_command
from unimatrix.recall_recipe import RecallRecipe

QUICK = ("--steps", 2, "--batch-size", 4, "--test-examples", 32)


def test_json_and_progress(monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    answer = run_command("recall", *QUICK, "--json")
    assert answer.exit_code == 0
    result = answer.result
    assert set(result["accuracy"]) == {"4", "6", "8"}
    assert result["parameters"] == 75_014
    assert result["state_bytes"] > 0
    assert result["train_s"] > 0
    assert answer.stderr.startswith("step 1 of 2  4.")
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
    expected = {name: getattr(recipe, name) for name in RecallRecipe.__slots__}
    assert result["recipe"] == {"task": "associative", **expected, "test_pairs": [4, 6, 8]}
    assert result["parameters"] == 75_014 - (2 * 64 + 1)
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_text() -> None:
    text = run_command("recall", *QUICK, "--preset", "core").text
    assert text.startswith("associative recall: core, 2 steps of 4, dropout 0.1, seed 19\n")
    assert "(trained on)" in text
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
    ],
)
def test_unusable_options(options, sentence) -> None:
    assert_refused(run_command("recall", *options), sentence)
