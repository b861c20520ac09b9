"""The checkpoints of a run: written whole or not at all, and checked before one is used."""

import contextlib
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from unimatrix.errors import InputError, WriteError, explain
from unimatrix.train.run_folder import CHECKPOINT_FOLDER, writing

SCRATCH_FOLDER = ".partial"
"""Where a checkpoint is written before it is renamed; leftovers of a dead process are deleted."""
_PREFIX = "checkpoint-"
_NEEDED_FILES = (
    "trainer_state.json",
    "config.json",
    "optimizer.pt",
    "scheduler.pt",
    "model.safetensors",
)


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Return step and path of each checkpoint in a run's folder of checkpoints, latest last."""
    numbers = {path: path.name.removeprefix(_PREFIX) for path in folder.glob(f"{_PREFIX}*")}
    return sorted((int(number), path) for path, number in numbers.items() if number.isdecimal())


def find_last_checkpoint(run: Path, say: Callable[[str], None] = lambda _: None) -> Path | None:
    """Return the latest checkpoint of a run that is whole; ``None`` if it has none at all.

    Args:
        run: the run folder.
        say: called with a sentence if a later checkpoint is not whole.

    Raises:
        InputError: if there are checkpoints and none is whole.
    """
    faults: list[str] = []
    for optim_step, path in reversed(list_checkpoints(run / CHECKPOINT_FOLDER)):
        fault = find_fault(path, optim_step)
        if fault is None:
            if faults:
                say(f"not whole: {', '.join(faults)}; going on from {path.name}")
            return path
        faults.append(f"{path.name} ({fault})")
    if faults:
        raise InputError(
            f"no checkpoint in {run / CHECKPOINT_FOLDER} is whole: {', '.join(faults)}; start a "
            "new run"
        )
    return None


def find_fault(checkpoint: Path, optim_step: int) -> str | None:
    """Return why a checkpoint cannot be resumed from, such as "optimizer.pt is missing".

    Returns:
        ``None`` if every file that resuming reads is there and can be read to its end.
    """
    for name in (*_NEEDED_FILES, *list_random_states(checkpoint)):
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        try:
            _read_through(path)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            return f"{name} is damaged: {explain(error)}"
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    if not isinstance(state, dict) or state.get("global_step") != optim_step:
        return f"trainer_state.json is not of step {optim_step}"
    return None


def list_random_states(checkpoint: Path) -> list[str]:
    """Return the names of the files of random states that a checkpoint needs, one a process."""
    ranks = [path.stem.rpartition("_")[2] for path in checkpoint.glob("rng_state_*.pth")]
    # The highest rank that was written tells how many processes there were.
    last = max((int(rank) for rank in ranks if rank.isdecimal()), default=None)
    return ["rng_state.pth"] if last is None else [f"rng_state_{i}.pth" for i in range(last + 1)]


@contextlib.contextmanager
def write_checkpoint(folder: Path, optim_step: int) -> Iterator[Path]:
    """Yield a scratch folder to write a checkpoint in; it is deleted if that fails.

    Raises:
        WriteError: if it cannot be written; the message names the checkpoint that is left.
    """
    scratch = folder / SCRATCH_FOLDER
    try:
        with writing(f"the checkpoint of step {optim_step:,} into {folder}", folder):
            yield scratch
    except WriteError as error:
        shutil.rmtree(scratch, ignore_errors=True)
        raise WriteError(f"{error}; {describe_kept(folder)}") from error


def describe_kept(folder: Path) -> str:
    """Return a sentence on which checkpoint is left of a training that failed."""
    found = list_checkpoints(folder)
    return f"{found[-1][1]} is kept" if found else "there is no checkpoint before it"


def publish_checkpoint(folder: Path, optim_step: int, keep: int | None) -> None:
    """Give a written checkpoint its name, and delete the oldest beyond ``keep``.

    Args:
        folder: of the run's checkpoints.
        optim_step: the step it is of.
        keep: how many to keep, this one included; ``None`` is all. Checkpoints of later steps, from
            before a resume, do not count.
    """
    name = f"{_PREFIX}{optim_step}"
    scratch = folder / SCRATCH_FOLDER / name
    # After a power cut a file may have its name and not its content. Checksums find that in every
    # file but the weights; waiting for all files would add seconds to a short run.
    with (scratch / "model.safetensors").open("rb") as weights:
        os.fsync(weights.fileno())
    # An older checkpoint of this step is not whole: the run would have resumed after it.
    shutil.rmtree(folder / name, ignore_errors=True)
    os.replace(scratch, folder / name)
    scratch.parent.rmdir()
    counted = [path for number, path in list_checkpoints(folder) if number <= optim_step]
    for path in counted[: -keep if keep else 0]:
        shutil.rmtree(path)


def _read_through(path: Path) -> None:
    """Raise ``ValueError``, ``BadZipFile`` or another error unless a file is whole."""
    if path.stat().st_size == 0:
        raise ValueError("it is empty")
    if path.suffix == ".json":
        json.loads(path.read_text(encoding="utf-8"))
    elif path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            safe_open(path, framework="np")
        except SafetensorError as error:
            raise ValueError(str(error)) from error
    else:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"its part {damaged} has another checksum")
