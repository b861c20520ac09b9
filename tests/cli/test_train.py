import gzip
import inspect
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.cli.test_main import run_main
from tests.train.small_training import build_recipe, build_text, one_thread
from unimatrix.cli import train
from unimatrix.cli.progress import TrainingProgress
from unimatrix.data import ByteStream, load_corpus
from unimatrix.hub.load import load_model
from unimatrix.train.recipe import Recipe, load_recipe
from unimatrix.train.run_folder import write_json

__all__ = ["one_thread"]

PARALLEL_TIMEOUT_S = 300


def write_recipe(folder: Path, *, prime_bytes: int = 0, **fields: Any) -> tuple[str, Recipe]:
    """Write the small recipe to a file; return its path and the recipe."""
    recipe = build_recipe(folder, **fields)
    recipe = replace(recipe, eval=replace(recipe.eval, prime_bytes=prime_bytes))
    path = folder / "small.json"
    path.write_text(json.dumps(recipe.to_dict()))
    return str(path), recipe


def read_result(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    captured = capsys.readouterr()
    assert captured.out.count("\n") == 1, captured.out
    result: dict[str, Any] = json.loads(captured.out)
    return result


def test_options_do_not_multiply() -> None:
    assert list(inspect.signature(train.run).parameters) == [
        "recipe",
        "preset",
        "data",
        "valid_data",
        "minutes",
        "steps",
        "out",
        "resume",
        "init",
        "assignments",
        "dry_run",
        "as_json",
        "device",
        "seed",
    ]


def test_result_is_on_stdout_and_the_rest_on_stderr(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = write_recipe(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert run_main(monkeypatch, "train", path, "--json", "--device", "cpu", "--steps", "3") == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert captured.out.count("\n") == 1
    assert 0 < result["bits_per_byte"] < 20
    assert 0 < result["xz_bits_per_byte"] < 20
    assert Path(result["run"], "model.safetensors").is_file()
    assert Path(result["run"]).parent == Path("runs")
    assert result["optim_steps"] == 3
    lines = captured.err.splitlines()
    assert lines[0].startswith("training 3 steps on ")
    assert all(line.startswith(("training ", "step ", "validating")) for line in lines)
    assert "bits per byte" in lines[1]
    assert "tokens/s" in lines[1]


@pytest.mark.parametrize("own_valid", [True, False])
def test_summary_names_the_next_two_commands(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    own_valid: bool,
) -> None:
    path, recipe = write_recipe(tmp_path, prime_bytes=10**6)
    first = recipe.data.data[0]
    prime = f" --prime {first}" if own_valid else ""  # It would hold the validation text.
    if own_valid:
        (tmp_path / "valid.txt").write_bytes(build_text(100))
        values = replace(recipe.data, valid_data=(str(tmp_path / "valid.txt"),))
        Path(path).write_text(json.dumps(replace(recipe, data=values).to_dict()))
    out = str(tmp_path / "my run")
    assert run_main(monkeypatch, "train", path, "--out", out, "--device", "cpu") == 0
    printed = capsys.readouterr().out
    assert "bits per byte" in printed
    assert "xz -9e" in printed
    assert "a sample" in printed
    assert "context carried, after " in printed
    assert f"unimatrix generate '{out}' \"The \"{prime}\n" in printed
    assert f"unimatrix eval '{out}'{prime}\n" in printed


def test_dry_run_prints_a_recipe_that_reads_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, recipe = write_recipe(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert run_main(monkeypatch, "train", path, "--dry-run") == 0
    assert sorted(tmp_path.iterdir()) == before
    again = tmp_path / "again.toml"
    again.write_text(capsys.readouterr().out)
    assert load_recipe(again) == recipe
    changes = ["--dry-run", "--json", "--seed", "9", "--set", "train.learning_rate=0.5"]
    assert run_main(monkeypatch, "train", path, *changes) == 0
    changed = Recipe.from_dict(read_result(capsys))
    assert (changed.train.seed, changed.train.learning_rate) == (9, 0.5)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--minutes", "1", "--steps", "2"], "give one of them"),
        (["--minutes", "0"], "greater than 0"),
        (["--steps", "0"], "at least 1"),
        (["--preset", "corre"], "Did you mean 'core'"),
        (["--set", "train.lr=1"], "Did you mean 'train.learning_rate'"),
        (["--device", "gpu"], "unknown device 'gpu'"),
        (["--data", "no-such-file"], "no-such-file"),
        (["--resume"], "name its folder with --out"),
        (["--resume", "--out", "nowhere"], "nowhere holds no run"),
        (["--out", "."], "not empty"),
        (["--init", "x", "--preset", "core"], "exactly one"),
        (["--set", "data.window_tokens=999", "--set", "model.max_position_embeddings=8"], "8 rows"),
    ],
)
def test_unusable_arguments_exit_2_and_write_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    sentence: str,
) -> None:
    path, _ = write_recipe(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert run_main(monkeypatch, "train", path, *arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert sentence in captured.err
    assert captured.err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_ctrl_c_saves_and_resume_is_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = write_recipe(tmp_path)
    unbroken, broken = str(tmp_path / "unbroken"), str(tmp_path / "broken")
    assert run_main(monkeypatch, "train", path, "--out", unbroken, "--device", "cpu") == 0
    capsys.readouterr()
    show, handler = TrainingProgress.on_step_end, signal.getsignal(signal.SIGINT)

    def interrupt(self: TrainingProgress, args: Any, state: Any, *rest: Any, **more: Any) -> None:
        show(self, args, state, *rest, **more)
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(TrainingProgress, "on_step_end", interrupt)
        assert run_main(patched, "train", path, "--out", broken, "--device", "cpu") == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "interrupted after step 2 of 6" in captured.err
    assert f"unimatrix train --resume --out {broken}" in captured.err
    assert signal.getsignal(signal.SIGINT) is handler

    wrong = ["train", "--resume", "--out", broken, "--device", "cpu", "--seed", "5"]
    assert run_main(monkeypatch, *wrong) == 2
    assert "train.seed differs" in capsys.readouterr().err
    # The command of the start may be repeated as it was.
    right = ["train", path, "--resume", "--out", broken, "--device", "cpu", "--json"]
    assert run_main(monkeypatch, *right) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["optim_steps"] == 6
    assert "continuing checkpoint 2" in captured.err
    one, other = (load_file(f"{run}/model.safetensors") for run in (unbroken, broken))
    assert all(torch.equal(one[name], other[name]) for name in one)


def call_at_step_2(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """Do something at the end of the second optimiser step."""
    show = TrainingProgress.on_step_end

    def show_and_act(self: TrainingProgress, a: Any, state: Any, *rest: Any, **more: Any) -> None:
        show(self, a, state, *rest, **more)
        if state.global_step == 2:
            act()

    monkeypatch.setattr(TrainingProgress, "on_step_end", show_and_act)


def test_a_run_beside_its_text_resumes_from_any_folder(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    path, _ = write_recipe(tmp_path)
    work, other = tmp_path / "work", tmp_path / "other"
    for folder in (work, other):
        folder.mkdir()
    (work / "a.txt").write_bytes(build_text(1000))
    (other / "b.txt").write_bytes(build_text(100))
    begin = ["train", path, "--data", ".", "--valid-data", "../other", "--device", "cpu", "--json"]
    monkeypatch.chdir(work)
    with monkeypatch.context() as patched:
        call_at_step_2(patched, lambda: os.kill(os.getpid(), signal.SIGINT))
        assert run_main(patched, *begin) == 1
    (run,) = (work / "runs").iterdir()
    stored = json.loads((run / "recipe.json").read_text())["data"]
    assert (stored["data"], stored["valid_data"]) == ([str(work)], [f"{work}/../other"])
    (checkpoint,) = (run / "checkpoints").glob("checkpoint-2")
    assert load_model(checkpoint).tokenizer is not None
    assert (checkpoint / "tokenizer.json").is_file()
    assert not caplog.messages

    monkeypatch.chdir(other)
    assert run_main(monkeypatch, "train", "--resume", "--out", str(run), "--device", "cpu") == 0
    assert caplog.messages == [f"left out of {work}: run folders ({run})"]
    capsys.readouterr()
    monkeypatch.chdir(work)
    assert run_main(monkeypatch, *begin) == 0
    assert caplog.messages[1:] == [f"left out of .: run folders (runs/{run.name})"]
    second = Path(read_result(capsys)["run"])
    hashes = {
        json.loads((one / "record.json").read_text())["corpus"]["sha256"] for one in (run, second)
    }
    assert len(hashes) == 1
    # What was typed at the start may be typed again.
    wrong = run_main(monkeypatch, *begin, "--resume", "--out", str(run))
    assert wrong == 2
    assert "is finished after 6 steps" in capsys.readouterr().err


@pytest.mark.parametrize("text_is_as_before", [True, False])
def test_a_run_that_began_before_text_was_left_out_resumes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    text_is_as_before: bool,
) -> None:
    path, _ = write_recipe(tmp_path)
    text, run = tmp_path / "text", tmp_path / "run"
    (text / "__pycache__").mkdir(parents=True)
    (text / "a.txt").write_bytes(build_text(1000))
    (text / "a.gz").write_bytes(gzip.compress(build_text(100)))
    (text / "__pycache__" / "b.txt").write_bytes(build_text(100))
    with monkeypatch.context() as patched:
        call_at_step_2(patched, lambda: os.kill(os.getpid(), signal.SIGINT))
        begin = ["train", path, "--data", str(text), "--out", str(run), "--device", "cpu"]
        assert run_main(patched, *begin) == 1
    record = json.loads((run / "record.json").read_text())
    assert record["corpus"].pop("file_rules") == 2
    # If not, the run wrote beside its text, as it could then, and what it wrote is left out now.
    before = load_corpus(str(text), as_before=text_is_as_before)
    assert (before.sha256 == record["corpus"]["sha256"]) is not text_is_as_before
    record["corpus"]["sha256"] = before.sha256
    write_json(run / "record.json", record)
    assert run_main(monkeypatch, "train", "--resume", "--out", str(run), "--device", "cpu") == 0


def test_text_that_shrinks_ends_the_run_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, recipe = write_recipe(tmp_path, save_every_steps=1)
    text, run = Path(recipe.data.data[0]), tmp_path / "run"
    whole = text.read_bytes()
    reading = partial(ByteStream.from_files, join_limit_bytes=0)
    monkeypatch.setattr(ByteStream, "from_files", staticmethod(reading))
    with monkeypatch.context() as patched:
        call_at_step_2(patched, lambda: os.truncate(text, 100))
        begin = ["train", path, "--out", str(run), "--device", "cpu"]
        assert run_main(patched, *begin) == 2
    message = f"{str(text)!r} shrank to 100 bytes while in use"
    assert f"error: {message}" in capsys.readouterr().err.splitlines()[-1]
    record = json.loads((run / "record.json").read_text())
    assert record["status"] == "failed"
    assert record["error"].startswith(message)
    text.write_bytes(whole)
    assert run_main(monkeypatch, *begin, "--resume") == 0


@pytest.mark.skipif(sys.platform != "linux", reason="other systems want file names in Unicode")
def test_names_that_are_not_utf8(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = write_recipe(tmp_path)
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    folder.mkdir()
    (folder / os.fsdecode(b"\xff.txt")).write_bytes(build_text(1000))
    monkeypatch.chdir(folder)
    assert isinstance(sys.stderr, io.TextIOWrapper)
    sys.stderr.reconfigure(errors="backslashreplace")  # As Python's own is.
    begin = ["train", path, "--data", ".", "--device", "cpu", "--json", "--out"]
    assert run_main(monkeypatch, *begin, os.fsdecode(b"run\xff")) == 2
    assert "is not UTF-8" in capsys.readouterr().err
    assert sorted(os.listdir(folder)) == [os.fsdecode(b"\xff.txt")]
    with monkeypatch.context() as patched:
        call_at_step_2(patched, lambda: os.kill(os.getpid(), signal.SIGINT))
        assert run_main(patched, *begin, str(tmp_path / "run")) == 1
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    resume = ["train", "--resume", "--json", "--out", str(tmp_path / "run"), "--device", "cpu"]
    assert run_main(monkeypatch, *resume) == 0
    assert read_result(capsys)["data"] == [str(folder)]


def test_divergence_exits_1_with_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = write_recipe(tmp_path, max_grad_norm=0.0, warmup_fraction=0.0)
    arguments = ["--set", "train.learning_rate=1e38", "--out", str(tmp_path / "run")]
    assert run_main(monkeypatch, "train", path, *arguments, "--device", "cpu") == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    last = captured.err.splitlines()[-1]
    assert last.startswith("error: the loss or its gradient is not finite at optimiser step ")


def test_torchrun_trains_with_the_same_global_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = write_recipe(tmp_path, steps=8)
    one, two = tmp_path / "one", tmp_path / "two"
    arguments = ["train", path, "--device", "cpu", "--json", "--set", "model.dropout=0.0", "--out"]
    assert run_main(monkeypatch, *arguments, str(one)) == 0
    alone = read_result(capsys)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "unimatrix", *arguments, str(two)],
        capture_output=True,
        text=True,
        timeout=PARALLEL_TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    assert done.stderr.count("validating") == 1
    together = json.loads(done.stdout)
    assert json.loads((two / "record.json").read_text())["num_processes"] == 2
    curves = [(run / "metrics.jsonl").read_text().splitlines() for run in (one, two)]
    losses = [[json.loads(line)["loss_nats"] for line in curve] for curve in curves]
    assert len(losses[0]) == 8
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert together["bits_per_byte"] == pytest.approx(alone["bits_per_byte"], rel=1e-4)
    weights = load_file(two / "model.safetensors")
    for name, weight in load_file(one / "model.safetensors").items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-4, atol=1e-5)
