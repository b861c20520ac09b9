import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from tests.train.small_training import build_dataset, build_model, build_settings, one_thread
from unimatrix.errors import InputError, WriteError
from unimatrix.train.checkpoints import find_fault, find_last_checkpoint, list_checkpoints
from unimatrix.train.trainer import train_model

__all__ = ["one_thread"]

FILES = (
    "config.json",
    "model.safetensors",
    "optimizer.pt",
    "rng_state.pth",
    "scheduler.pt",
    "trainer_state.json",
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run folder with checkpoints of steps 2 and 4."""
    out = tmp_path_factory.mktemp("trained")
    settings = build_settings(steps=4, save_every_steps=2)
    train_model(build_model(), build_dataset(16), settings, out)
    return out


def remove(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("spoil", [remove, empty, cut])
@pytest.mark.parametrize("name", FILES)
def test_a_checkpoint_is_whole_or_not_used(
    tmp_path: Path, trained: Path, name: str, spoil: Any
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    last = run / "checkpoints" / "checkpoint-4"
    said: list[str] = []
    assert find_last_checkpoint(run, said.append) == last
    assert said == []
    spoil(last / name)
    assert find_last_checkpoint(run, said.append) == last.with_name("checkpoint-2")
    assert len(said) == 1
    assert said[0].startswith(f"not whole: checkpoint-4 ({name} is ")
    assert said[0].endswith("going on from checkpoint-2")
    spoil(last.with_name("checkpoint-2") / name)
    with pytest.raises(InputError, match=r"checkpoints is whole: checkpoint-4 .*, checkpoint-2 "):
        find_last_checkpoint(run)


def test_bytes_that_a_disk_has_changed_are_found(tmp_path: Path, trained: Path) -> None:
    last = tmp_path / "checkpoint-4"
    shutil.copytree(trained / "checkpoints" / "checkpoint-4", last)
    content = bytearray((last / "optimizer.pt").read_bytes())
    content[len(content) // 2] ^= 255
    (last / "optimizer.pt").write_bytes(content)
    assert "optimizer.pt is damaged" in str(find_fault(last, 4))
    assert find_fault(trained / "checkpoints" / "checkpoint-4", 2) == (
        "trainer_state.json is not of step 2"
    )


def test_every_process_has_its_random_state(tmp_path: Path, trained: Path) -> None:
    last = tmp_path / "checkpoint-4"
    shutil.copytree(trained / "checkpoints" / "checkpoint-4", last)
    for rank in (0, 2):
        shutil.copy(last / "rng_state.pth", last / f"rng_state_{rank}.pth")
    assert find_fault(last, 4) == "rng_state_1.pth is missing"
    shutil.copy(last / "rng_state.pth", last / "rng_state_1.pth")
    assert find_fault(last, 4) is None


def test_without_a_checkpoint_a_run_begins_at_the_beginning(tmp_path: Path) -> None:
    assert find_last_checkpoint(tmp_path) is None
    (tmp_path / "checkpoints" / "checkpoint-old").mkdir(parents=True)
    (tmp_path / "checkpoints" / ".partial" / "checkpoint-3").mkdir(parents=True)
    assert find_last_checkpoint(tmp_path) is None


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path: Path) -> None:
    for number in (10, 9, 100):
        (tmp_path / f"checkpoint-{number}").mkdir()
    assert [number for number, _ in list_checkpoints(tmp_path)] == [9, 10, 100]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "no space left on device"),
        (RuntimeError("basic_ios::clear: iostream error"), "basic_ios::clear: iostream error"),
    ],
)
def test_a_full_disk_leaves_the_checkpoints_before_and_no_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    save, settings = torch.save, build_settings(steps=6, save_every_steps=2)
    full = False

    def save_or_fail(values: Any, path: Any) -> None:
        save(values, path)
        if full and Path(path).name == "scheduler.pt":
            raise error

    class Fill(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_unused: Any) -> None:
            nonlocal full
            full = state.global_step == 4

    monkeypatch.setattr(torch, "save", save_or_fail)
    with pytest.raises(WriteError) as failed:
        train_model(build_model(), build_dataset(24), settings, tmp_path, callbacks=[Fill()])
    folder = tmp_path / "checkpoints"
    assert str(failed.value) == (
        f"cannot write the checkpoint of step 4 into {folder}: {reason}; "
        f"{folder / 'checkpoint-2'} is kept"
    )
    assert [path.name for path in folder.iterdir()] == ["checkpoint-2"]
    assert find_last_checkpoint(tmp_path) == folder / "checkpoint-2"


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path, trained: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    weights = run / "checkpoints" / "checkpoint-4" / "model.safetensors"
    values = load_file(weights)
    values["model.former_name"] = values.pop("model.norm.weight")
    save_file(values, weights, metadata={"format": "pt"})
    settings, last = build_settings(steps=6), find_last_checkpoint(run)
    with pytest.raises(InputError, match=r"of another model: 'model\.former_name'"):
        train_model(build_model(), build_dataset(24), settings, run, checkpoint=last)


def test_old_checkpoints_go_and_those_after_a_resume_stay(tmp_path: Path, trained: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    folder = run / "checkpoints"
    (folder / "checkpoint-4" / "optimizer.pt").unlink()
    settings = build_settings(steps=4, save_every_steps=2, keep_checkpoints=1)
    last = find_last_checkpoint(run)
    seen: list[list[int]] = []

    class Look(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_unused: Any) -> None:
            control.should_save = True

        def on_save(self, args: Any, state: Any, control: Any, **_unused: Any) -> None:
            seen.append([number for number, _ in list_checkpoints(folder)])

    train_model(
        build_model(), build_dataset(16), settings, run, checkpoint=last, callbacks=[Look()]
    )
    assert seen == [[3, 4], [4]]
    assert find_fault(folder / "checkpoint-4", 4) is None
    state = json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["global_step"] == 4
