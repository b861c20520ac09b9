import errno
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.locks import hold_elsewhere
from unimatrix.errors import InputError, WriteError
from unimatrix.hub.load import load_model
from unimatrix.train.recipe import Recipe
from unimatrix.train.run_folder import (
    create_folder,
    create_numbered_folder,
    describe_versions,
    hash_config,
    hold_folder,
    hold_results,
    is_in_use,
    read_run,
    require_new_folder,
    require_unicode_path,
    start_record,
    trim_metrics,
    write_file,
    write_json,
    write_record,
    writing,
)


def test_default_folders_count_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = [create_numbered_folder("core-my texts/a.txt").as_posix() for _ in range(2)]
    assert names == ["runs/core-my-texts-a.txt-1", "runs/core-my-texts-a.txt-2"]
    assert create_numbered_folder("...").name == "run-1"


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    with create_folder(tmp_path / "deep" / "new"):
        assert (tmp_path / "deep" / "new").is_dir()
    full = tmp_path / "full"
    full.mkdir()
    with create_folder(full):
        (full / "notes").write_text("mine")
    with pytest.raises(InputError, match="not empty"), create_folder(full):
        pass
    with pytest.raises(InputError, match="not empty"), create_folder(full / "notes"):
        pass
    write_json(full / "recipe.json", Recipe().to_dict())
    for status, resumable, advice in (
        ("training", True, "add --resume to continue it, or choose another --out"),
        ("training", False, "please choose another --out"),
        ("done", True, "please choose another --out"),
    ):
        write_record(full, {"status": status})
        with pytest.raises(InputError, match=advice):
            require_new_folder(full, resumable=resumable)


def test_a_folder_is_held_by_one_process_until_it_is_gone(tmp_path: Path) -> None:
    with hold_elsewhere(tmp_path) as other:
        assert is_in_use(tmp_path)
        for hold in (hold_folder, hold_results, create_folder):
            with pytest.raises(InputError, match="is in use"), hold(tmp_path):
                pass
        other.kill()  # It cleans nothing up.
        other.wait()
        with hold_folder(tmp_path), hold_folder(tmp_path):
            assert not is_in_use(tmp_path)
    with create_folder(tmp_path):
        pass  # What is left of a lock is nothing.


def test_a_folder_is_held_by_one_thread(tmp_path: Path) -> None:
    with hold_folder(tmp_path), ThreadPoolExecutor(1) as pool:
        assert pool.submit(is_in_use, tmp_path).result()
    assert not is_in_use(tmp_path)


def test_two_who_create_a_folder_at_once_do_not_share_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, mkdir = tmp_path / "new", Path.mkdir

    def be_late(self: Path, *args: Any, **kwargs: Any) -> None:
        mkdir(self, *args, **kwargs)
        (self / "record.json").write_text("{}")

    monkeypatch.setattr(Path, "mkdir", be_late)
    with pytest.raises(InputError, match="not empty"), create_folder(path):
        pass


def test_a_file_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "record.json"
    write_file(path, "first")
    monkeypatch.setattr(os, "fsync", fail_with(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(WriteError, match=r"cannot write .*record\.json: no space left on device"):
        write_file(path, "second")
    assert os.listdir(tmp_path) == ["record.json"]
    assert path.read_text() == "first"


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(errno.EROFS, "Read-only file system"), "cannot write it: read-only file system"),
        (RuntimeError("[enforce fail] . unexpected"), "cannot write it: no space left on device"),
        (Exception("No space left (os error 28)"), r"cannot write it: No space left \(os error 28"),
    ],
)
def test_what_writers_raise_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, sentence: str
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(WriteError, match=sentence), writing("it", tmp_path):
        raise error
    for other in (InputError("x"), TypeError("x")):
        with pytest.raises(type(other), match=r"^x$"), writing("it", tmp_path):
            raise other


def fail_with(error: Exception) -> Callable[..., None]:
    def fail(*_args: object) -> None:
        raise error

    return fail


def test_metrics_are_trimmed_to_the_checkpoint(tmp_path: Path) -> None:
    trim_metrics(tmp_path, 3)
    path = tmp_path / "metrics.jsonl"
    lines = [f'{{"optim_step": {i}}}\n' for i in range(6)]
    lines[2:2] = ["\0\0\0}\n", "\ufffd\n", "{}\n"]
    path.write_bytes("".join(lines).encode() + b'\xff{"optim_s')
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
