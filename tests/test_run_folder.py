import json
import os
from pathlib import Path

import pytest

from unimatrix.checkpoints import load_model
from unimatrix.errors import InputError
from unimatrix.recipe import Recipe
from unimatrix.run_folder import (
    create_run_folder,
    describe_versions,
    find_last_checkpoint,
    hash_config,
    read_run,
    require_unicode_path,
    start_record,
    trim_metrics,
    write_json,
    write_record,
)


def test_default_folders_count_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = [create_run_folder(None, "core-my texts/a.txt").as_posix() for _ in range(2)]
    assert names == ["runs/core-my-texts-a.txt-1", "runs/core-my-texts-a.txt-2"]
    assert create_run_folder(None, "...").name == "run-1"


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    assert create_run_folder(tmp_path / "deep" / "new", "x").is_dir()
    full = tmp_path / "full"
    full.mkdir()
    assert create_run_folder(full, "x") == full
    (full / "notes").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        create_run_folder(full, "x")
    with pytest.raises(InputError, match="not empty"):
        create_run_folder(full / "notes", "x")
    write_record(full, {})
    with pytest.raises(InputError, match="--resume"):
        create_run_folder(full, "x")


def test_last_checkpoint_is_the_last_complete_one(tmp_path: Path) -> None:
    assert find_last_checkpoint(tmp_path) is None
    for number in (9, 10, 11):
        folder = tmp_path / "checkpoints" / f"checkpoint-{number}"
        folder.mkdir(parents=True)
        if number < 11:
            (folder / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoints" / "checkpoint-old").mkdir()
    last = find_last_checkpoint(tmp_path)
    assert last is not None
    assert last.name == "checkpoint-10"


def test_metrics_are_trimmed_to_the_checkpoint(tmp_path: Path) -> None:
    trim_metrics(tmp_path, 3)
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"optim_step": {i}}}\n' for i in range(6)) + '{"optim_s')
    trim_metrics(tmp_path, 3)
    assert [json.loads(line)["optim_step"] for line in path.read_text().splitlines()] == [
        0,
        1,
        2,
        3,
    ]


def test_run_is_read_back(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no run"):
        read_run(tmp_path)
    write_json(tmp_path / "recipe.json", Recipe().to_dict())
    write_record(tmp_path, {"status": "training"})
    assert sorted(os.listdir(tmp_path)) == ["recipe.json", "record.json"]
    recipe, record = read_run(tmp_path)
    assert recipe == Recipe()
    assert record["status"] == "training"
    write_json(tmp_path / "record.json", {"format_version": 99})
    with pytest.raises(InputError, match="upgrade"):
        read_run(tmp_path)
    for damaged in ("[]", "{", "{}"):
        (tmp_path / "record.json").write_text(damaged)
        with pytest.raises(InputError, match="damaged"):
            read_run(tmp_path)


def test_record_says_where_it_comes_from() -> None:
    record = json.loads(json.dumps(start_record(Recipe(), {"b": 1, "a": 2}, "cpu")))
    assert record["config_sha256"] == hash_config({"a": 2, "b": 1})
    assert record["hardware"]["num_threads"] >= 1
    assert record["commit"] is None or set(record["commit"]) == {"hash", "dirty"}
    assert {"python", "torch", "unimatrix-lm"} <= set(describe_versions())


def test_a_path_that_is_not_utf8_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    path = Path(str(tmp_path), "run\udcff")
    for use in (require_unicode_path, read_run, load_model):
        path.mkdir(exist_ok=True)
        (path / "config.json").write_text('{"model_type": "unimatrix"}')
        with pytest.raises(InputError, match=r"is not UTF-8.*choose another name"):
            use(path)
    require_unicode_path(tmp_path / "é")
