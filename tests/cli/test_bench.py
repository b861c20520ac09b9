"""``unimatrix bench``: refusals, the table, and what a run leaves in its folder."""

import json
import re
from pathlib import Path

import pytest

from tests.cli.command import assert_refused, run_command
from unimatrix.bench import models, run
from unimatrix.bench.equivalence import EquivalenceError
from unimatrix.bench.probe import Probe
from unimatrix.cli import bench
from unimatrix.reports.bench_plots import BYTES_FILE, SPEED_FILE

SIZES = ("hidden_size=16", "num_hidden_layers=2", "num_attention_heads=2", "model.head_dim=8")
SMALL = [part for size in SIZES for part in ("--set", size)]
QUICKLY = ("--rounds", 1, "--threads", 1, "--device", "cpu", *SMALL)
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def _no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the place of the runs in processes of their own, which have tests of their own."""

    def probe(cell, setting) -> Probe:
        if cell.model.name == "rwkv":
            return Probe(failure="one run took longer than 5 s")
        return Probe(run_s=1e-3, peak_bytes=4096, state_bytes=2048)

    monkeypatch.setattr(run, "probe", probe)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--mode", "trian"], ["unknown mode 'trian'", "Did you mean 'train'?"]),
        (["--peer", "lama"], ["unknown peer 'lama'", "Did you mean 'llama'?"]),
        (["--preset", "cores"], ["unknown preset 'cores'", "Did you mean 'core'?"]),
        (["--length", 1], ["--length 1 is too short"]),
        (["--length", 8, "--length", 8], ["--length 8, 8", "name each once"]),
        (["--preset", "none", "--peer", "none"], ["nothing is left to time"]),
        (["--mode", "start", "--preset", "none", "--peer", "none"], ["nothing is left to time"]),
        (["--mode", "automaton", "--data", "nowhere.txt"], ["'nowhere.txt' is no file"]),
        (["--compile", "--preset", "none"], ["--compile is for train steps of presets"]),
        (["--compile", "--mode", "forward"], ["--compile is for train steps of presets"]),
        (["--precision", "float16"], ["unknown precision 'float16'", "Did you mean 'bfloat16'?"]),
        (["--equal-parameters", "--peer", "none"], ["--equal-parameters is for peers beside"]),
        (["--set", "hidden_sizes=3"], ["hidden_sizes", "Did you mean 'hidden_size'"]),
        (["--set", "preset=core"], ["--set preset=core", "--preset"]),
        (["--set", "hidden_size=0"], ["hidden_size is 0"]),
        (["--device", "gpu"], ["unknown device 'gpu'"]),
    ],
)
def test_refusals(tmp_path: Path, arguments: list[object], parts: list[str]) -> None:
    out = tmp_path / "new"
    assert_refused(run_command("bench", "--out", out, *arguments), *parts)
    assert not out.exists()


def test_automaton_and_starts_need_no_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("libraries_s", "first_token_s", "fastest_s", "slowest_s", "second_token_s")
    names += ("first_ever_first_token_s", "first_ever_second_token_s")
    row = {"model": "core", "skipped": None, "rounds": 3} | dict.fromkeys(names, 0.25)
    monkeypatch.setattr(run, "time_starts", lambda specs, **_: [row, skipped])
    skipped = {"model": "gla", "skipped": "it needs a GPU"}
    text, out = tmp_path / "text.txt", tmp_path / "run"
    text.write_text("to be or not to be, that is the question. " * 50)
    answer = run_command(
        "bench", "--mode", "start", "--mode", "automaton", "--length", 64, "--length", 32,
        "--data", text, "--preset", "core", "--peer", "none", "--out", out, *QUICKLY,
    )  # fmt: skip
    assert answer.exit_code == 0, answer.stderr
    lines = answer.text.splitlines()
    assert lines[0] == "float32, dropout 0, 1 threads"
    assert sum(line.startswith("Fibonacci word") for line in lines) == 2
    assert lines[-1] == "skipped: start, gla: it needs a GPU"
    assert lines[-2].split() == ["gla", "skipped"]
    assert lines[-3].split() == ["core", "0.25", "0.25", "0.25-0.25", "3", "0.25", "0.25", "0.25"]
    assert all(len(line) <= 100 for line in lines)
    results = json.loads((out / "record.json").read_text(encoding="utf-8"))["results"]
    assert (results["rows"], results["text"], results["start"]) == ([], str(text), [row, skipped])
    assert [path.name for path in out.glob("[!.]*")] == ["record.json"]


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("kept")
    answer = run_command("bench", "--out", tmp_path, "--mode", "train", "--length", 8)
    assert_refused(answer, "already exists and is not empty")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_run_leaves_a_record_and_plots_and_prints_a_table(tmp_path: Path) -> None:
    out = tmp_path / "run"
    models = ("--preset", "core", "--peer", "llama", "--peer", "rwkv")
    answer = run_command(
        "bench", "--mode", "train", "--mode", "prefill", "--length", 8, "--length", 16,
        *models, "--out", out, *QUICKLY,
    )  # fmt: skip
    assert answer.exit_code == 0, answer.stderr
    lines = answer.text.splitlines()
    assert lines[0].startswith("float32, dropout 0, 1 threads; matmul peak ")
    assert sum(line.startswith("core ") for line in lines) == 4
    assert "skipped: train, rwkv at 8: one run took longer than 5 s" in lines
    assert all(len(line) <= 100 for line in lines)

    record = json.loads((out / "record.json").read_text(encoding="utf-8"))
    assert {"commit", "hardware", "versions", "seed", "device"} <= set(record)
    rows = record["results"]["rows"]
    assert len(rows) == 12
    assert {row["model"] for row in rows if row["skipped"]} == {"rwkv"}
    assert record["results"]["models"][0]["overrides"] == {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8,
    }  # fmt: skip
    for name in (SPEED_FILE, BYTES_FILE):
        assert (out / name).read_bytes().startswith(PNG)


def test_json_and_one_model_alone() -> None:
    answer = run_command(
        "bench", "--mode", "forward", "--length", 8, "--batch-size", 3, "--preset", "core",
        "--peer", "none", "--json", *QUICKLY,
    )  # fmt: skip
    (row,) = answer.result["rows"]
    assert (row["model"], row["batch_size"], row["ratio_to_llama"]) == ("core", 3, None)


def test_products_in_16_bits_and_peers_of_equal_size() -> None:
    answer = run_command(
        "bench", "--mode", "train", "--length", 8, "--preset", "core", "--peer", "llama",
        "--precision", "bfloat16", "--equal-parameters", *QUICKLY,
    )  # fmt: skip
    assert answer.exit_code == 0, answer.stderr
    first, *_, last = answer.text.splitlines()
    assert first.startswith("bfloat16, dropout 0, 1 threads; matmul peak ")
    ours, theirs = re.fullmatch(r"parameters: core ([\d,]+), llama ([\d,]+)", last).groups()
    ours, theirs = (int(number.replace(",", "")) for number in (ours, theirs))
    assert abs(ours - theirs) < 0.1 * ours


def test_what_is_wrong_is_refused_with_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args, **kwargs):
        raise EquivalenceError("core: slots (native) differs from the reference")

    monkeypatch.setattr(run, "check_model", refuse)
    answer = run_command("bench", "--mode", "train", "--length", 8, "--preset", "core", *QUICKLY)
    assert answer.exit_code == 1
    assert answer.stdout == b""
    assert "error: core: slots (native) differs from the reference" in answer.stderr


def test_compiled_steps_are_rows_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "COMPILER", "aot_eager")
    options = ["--mode", "train", "--length", 8, "--preset", "core", "--peer", "llama", *QUICKLY]
    result = run_command("bench", "--compile", *options, "--json").result
    names = ["core", "llama", "core, compiled", "llama, compiled"]
    assert [row["model"] for row in result["rows"]] == names


def test_defaults() -> None:
    assert bench._choose_lengths(None, quick=False)[-1] == 2**20
    assert bench._choose_lengths(None, quick=True) == [128, 1024]
    assert bench._choose_lengths([30, 2], quick=True) == [2, 30]
    assert bench._choose_peers(None, "cpu") == ["llama", "mamba2", "rwkv"]
    assert "gla" in bench._choose_peers(None, "cuda")
    assert bench._choose_peers(["none"], "cpu") == []
