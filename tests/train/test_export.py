"""A finished run becomes a model of the package: small, loadable, without paths of a machine."""

import json
from pathlib import Path

import pytest
import torch

from tests.train.small_training import build_recipe, have_equal_weights, one_thread
from unimatrix.errors import InputError
from unimatrix.hub import packaged
from unimatrix.hub.load import load_model
from unimatrix.train import export
from unimatrix.train.export import export_run, main
from unimatrix.train.judge import judge_run
from unimatrix.train.run import prepare_run, start_run, train_run

__all__ = ["one_thread"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return the folder of a finished run."""
    started = prepare_run(build_recipe(tmp_path, steps=2), tmp_path / "run", "cpu")
    start_run(started, lambda _sentence: None)
    train_run(started)
    judge_run(started)
    return tmp_path / "run"


def test_a_run_becomes_a_model_with_its_history(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    num_bytes = export_run(run, out)
    assert num_bytes == (out / "model.safetensors").stat().st_size
    assert have_equal_weights(load_model(out).model, load_model(run).model)
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.json",
    ]
    training = json.loads((out / "training.json").read_text())
    assert training["recipe"]["data"]["data"] == ["corpus.txt"]
    assert training["record"]["status"] == "done"
    assert training["record"]["corpus"]["name"] == "corpus.txt"
    for path in out.iterdir():
        if path.suffix == ".json":
            assert str(tmp_path) not in path.read_text()
    export_run(run, out)  # An export is replaced.


def test_half_the_bytes(run: Path, tmp_path: Path) -> None:
    whole = export_run(run, tmp_path / "whole")
    half = export_run(run, tmp_path / "half", "float16")
    assert half < 0.7 * whole
    model = load_model(tmp_path / "half").model
    assert model.dtype == torch.float32
    expected = load_model(run).model.half().float()
    assert have_equal_weights(model, expected)


def test_the_command(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in (packaged, export):
        monkeypatch.setattr(module, "FOLDER", tmp_path / "models")
    assert main([str(run)]) == 0
    assert capsys.readouterr().out.startswith("unimatrix-reader: ")
    assert have_equal_weights(load_model("unimatrix-reader").model, load_model(run).model)
    assert main([str(run), "--name", "reader"]) == 2
    assert "Did you mean 'unimatrix-reader'?" in capsys.readouterr().err
    assert main([str(tmp_path / "no")]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_what_cannot_be_exported(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="dtype is 'int8'"):
        export_run(run, tmp_path / "out", "int8")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").touch()
    with pytest.raises(InputError, match="is not empty"):
        export_run(run, tmp_path / "mine")
    monkeypatch.setattr(export, "MOST_BYTES", 100)
    with pytest.raises(InputError, match=r"carries at most 100; export float16"):
        export_run(run, tmp_path / "out")
    record = json.loads((run / "record.json").read_text())
    (run / "record.json").write_text(json.dumps(record | {"status": "interrupted"}))
    with pytest.raises(InputError, match="has not finished; finish it with"):
        export_run(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
