"""Every example runs as its reader would run it, on less."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest

from tests.train.small_training import build_model

EXAMPLES = Path(__file__).parents[2] / "examples"


def run_example(name: str, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run an example as a script with arguments."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Return a file of text, in a folder of its own."""
    folder = tmp_path / "text"
    folder.mkdir()
    letters = np.random.default_rng(0).integers(97, 100, 20_000, dtype=np.uint8)
    (folder / "text.txt").write_bytes(letters.tobytes())
    return folder / "text.txt"


def test_fine_tune_continues_a_saved_model(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build_model().save_pretrained(tmp_path / "model")
    out = tmp_path / "tuned"
    arguments = [str(text.parent), str(tmp_path / "model"), "--steps", "4", "--out", str(out)]
    run_example("fine_tune.py", *arguments, monkeypatch=monkeypatch)
    assert (out / "model.safetensors").is_file()
    bits = float(capsys.readouterr().out.rstrip().rpartition(" ")[2])
    assert 0 < bits < 8.5


def test_stream_goes_on_from_a_file(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build_model().save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    run_example("stream.py", "model", str(text), monkeypatch=monkeypatch)
    assert (tmp_path / "stream.safetensors").is_file()
    assert capsys.readouterr().out.startswith("20,001 tokens in a state of ")


def test_own_mixer_trains_and_goes_on_from_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run_example("own_mixer.py", monkeypatch=monkeypatch)
    printed = capsys.readouterr().out
    assert "'average': 768" in printed
    assert float(printed.split("differ by ")[1].split()[0]) < 1e-4
    assert float(printed.split()[1]) < 2


def test_notebook_of_the_recall_lab_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    notebook = json.loads((EXAMPLES / "recall_lab.ipynb").read_text(encoding="utf-8"))
    monkeypatch.setattr(plt, "show", lambda: None)
    names: dict[str, Any] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            source = "".join(cell["source"]).replace("STEPS = 200", "STEPS = 3")
            exec(source.replace("test_examples=256", "test_examples=32"), names)
    plt.close("all")
    printed = capsys.readouterr().out
    assert "4 in 4 slots" in printed
    assert "bytes of state" in printed
