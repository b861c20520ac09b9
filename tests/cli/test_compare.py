import json

import pytest

from tests.cli.command import assert_refused, run_command
from tests.studies.compare.small import write_corpus
from unimatrix.studies.compare import trained_cell
from unimatrix.train.plan import StepPlan

RECIPE = """
num_layers = 1
num_heads = 2
[models.ours]
preset = "core"
overrides = { hidden_size = 16, num_attention_heads = 2, intermediate_size = 64 }
[models.theirs]
peer = "gated-deltanet"
[text]
corpora = ["nowhere"]
window_tokens = 16
eval_bytes = 100
[sweep]
learning_rates = [1e-3]
eval_bytes = 100
[recall]
test_pairs = [4]
test_tokens = [128]
test_examples = 4
length_examples = 4
batch_size = 4
[train]
batch_size = 4
log_every_steps = 1
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trained_cell, "plan_steps", lambda *_, **__: StepPlan(2, 0.01, 1))
    path = tmp_path / "mine.toml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


def test_tables_report_and_a_second_run(recipe, tmp_path, monkeypatch) -> None:
    corpus = write_corpus(tmp_path / "words")
    options = ("compare", recipe, "--data", corpus, "--only", "theirs", "--device", "cpu")
    answer = run_command(*options)
    assert answer.exit_code == 0, answer
    assert "words: Equal parameters, equal steps, bits per byte" in answer.text
    assert "report  runs/compare-mine/report.html" in answer.text
    assert answer.stderr.splitlines()[0] == "compressors/words (5 left)"
    assert answer.stderr.splitlines()[-1] == "recall/theirs (1 left)"
    folder = tmp_path / "runs" / "compare-mine"
    assert (folder / "report.html").is_file()
    record = json.loads((folder / "time/words/theirs/record.json").read_text())

    monkeypatch.setattr(trained_cell, "train_model", None)
    again = run_command(*options, "--report", "other.html", "--json")
    assert again.exit_code == 0, again
    assert again.result["cells"]["time/words/theirs"]["results"] == record["results"]
    assert (tmp_path / "other.html").is_file()


def test_quick_is_a_comparison_of_its_own(recipe, tmp_path) -> None:
    corpus = write_corpus(tmp_path / "words")
    answer = run_command("compare", recipe, "--quick", "--only", "ours", "--data", corpus, "--json")
    assert answer.exit_code == 0, answer
    assert answer.result["out"] == "runs/compare-mine-quick"
    assert answer.result["cells"]["parameters/words/ours"]["num_optim_steps"] == 2


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("smal",), ("no comparison 'smal'", "Did you mean 'small'?")),
        (("--only", "lama"), ("no model 'lama'", "Did you mean 'llama'?")),
        (("--data", "nowhere"), ("'nowhere' is no file",)),
        (("--report", "x.txt"), ("ending in .html",)),
    ],
)
def test_refused(recipe, tmp_path, options, parts) -> None:
    assert_refused(run_command("compare", *options), *parts)
    assert not (tmp_path / "runs").exists()
