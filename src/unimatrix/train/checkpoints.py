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
"""Where a checkpoint is written before it gets its name; what a dead process left means nothing."""
_PREFIX = "checkpoint-"
_NEEDED_FILES = (
    "trainer_state.json",
    "config.json",
    "optimizer.pt",
    "scheduler.pt",
    "model.safetensors",
)


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Return the checkpoints in a run's folder of checkpoints with their steps, latest last."""
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

    Args:
        checkpoint: its folder.
        optim_step: the step that it must be of.

    Returns:
        ``None`` if it is whole: every file that resuming reads is there and can be read to its end.
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
    """Return the names of the random states that a checkpoint has or lacks, one a process."""
    ranks = [path.stem.rpartition("_")[2] for path in checkpoint.glob("rng_state_*.pth")]
    # The number of processes is told by the last of them.
    last = max((int(rank) for rank in ranks if rank.isdecimal()), default=None)
    return ["rng_state.pth"] if last is None else [f"rng_state_{i}.pth" for i in range(last + 1)]


@contextlib.contextmanager
def write_checkpoint(folder: Path, optim_step: int) -> Iterator[Path]:
    """Yield a folder to write a checkpoint below; nothing stays of it if that fails.

    Args:
        folder: of the run's checkpoints.
        optim_step: the step.

    Raises:
        WriteError: if it cannot be written; the message names what is left to go on from.
    """
    scratch = folder / SCRATCH_FOLDER
    try:
        with writing(f"the checkpoint of step {optim_step:,} into {folder}", folder):
            yield scratch
    except WriteError as error:
        shutil.rmtree(scratch, ignore_errors=True)
        raise WriteError(f"{error}; {describe_kept(folder)}") from error


def describe_kept(folder: Path) -> str:
    """Return which checkpoint is left of a training that failed."""
    found = list_checkpoints(folder)
    return f"{found[-1][1]} is kept" if found else "there is no checkpoint before it"


def publish_checkpoint(folder: Path, optim_step: int, keep: int | None) -> None:
    """Give a written checkpoint its name, and delete those that are too many.

    Args:
        folder: of the run's checkpoints.
        optim_step: the step it is of.
        keep: how many to keep up to this one; ``None`` is all. Later ones are from before a resume.
    """
    name = f"{_PREFIX}{optim_step}"
    scratch = folder / SCRATCH_FOLDER / name
    # After a power cut a name may stand for a file without its content, which a checksum finds in
    # the others; the weights have none. All of them would be seconds in a short run.
    with (scratch / "model.safetensors").open("rb") as weights:
        os.fsync(weights.fileno())
    # One that was not whole, or the run would not have come here again.
    shutil.rmtree(folder / name, ignore_errors=True)
    os.replace(scratch, folder / name)
    scratch.parent.rmdir()
    kept = [path for number, path in list_checkpoints(folder) if number <= optim_step]
    for path in kept[: -keep if keep else 0]:
        shutil.rmtree(path)


def _read_through(path: Path) -> None:
    """Raise ``ValueError``, ``BadZipFile`` or another error unless a file is whole."""
    if path.stat().st_size == 0:
        raise ValueError("it is empty")
    if path.suffix == ".json":
        json.loads(path.read_text(encoding="utf-8"))
    elif path.suffix == ".safetensors":
        _read_weights(path)
    else:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"its part {damaged} has another checksum")


def _read_weights(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np"):
            pass
    except SafetensorError as error:
        raise ValueError(str(error)) from error
