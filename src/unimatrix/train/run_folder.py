"""The folder of one training run: its files, and the record of how they came about.

``config.json``, ``model.safetensors``, the tokenizer's files and ``load_unimatrix.py``, by which
``trust_remote_code=True`` finds this package, make the folder a saved model; ``recipe.json``,
``record.json``, ``metrics.jsonl``, ``tensorboard/`` and ``checkpoints/`` are its history.
"""

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from unimatrix.errors import InputError, RunError, WriteError, explain
from unimatrix.train.recipe import Recipe, load_recipe

FORMAT_VERSION = 1
RECIPE_FILE = "recipe.json"
RECORD_FILE = "record.json"
METRICS_FILE = "metrics.jsonl"
LOCK_FILE = ".lock"
CHECKPOINT_FOLDER = "checkpoints"
TENSORBOARD_FOLDER = "tensorboard"
DEFAULT_PARENT = Path("runs")

_PACKAGES = ("unimatrix-lm", "torch", "transformers", "accelerate", "numba", "numpy", "tokenizers")
_GIT_TIMEOUT_S = 10
_FULL_BYTES = 2**20


def require_unicode_path(path: Path) -> None:
    """Raise ``InputError`` for a path that is not UTF-8.

    safetensors, tokenizers and TensorBoard cannot open such a path; data may lie there.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{str(path)!r} is not UTF-8, and models are saved and loaded under such names only; "
            "choose another name"
        ) from error


def is_vacant(path: Path) -> bool:
    """Whether ``path`` is missing, or a folder of nothing but a lock."""
    if not path.is_dir():
        return not path.exists()
    return all(entry.name == LOCK_FILE for entry in path.iterdir())


def require_new_folder(path: Path, *, resumable: bool = False) -> None:
    """Raise ``InputError`` unless ``path`` is missing or an empty folder that nobody writes to.

    The message suggests ``--resume`` if the folder holds an unfinished run and ``resumable`` is
    set.
    """
    if is_in_use(path):
        raise InputError(
            f"{path} is in use: another process is writing there; choose another --out"
        )
    if not is_vacant(path):
        can_resume = resumable and _is_unfinished(path)
        advice = "add --resume to continue it, or" if can_resume else "please"
        raise InputError(f"{path} already exists and is not empty; {advice} choose another --out")


@contextlib.contextmanager
def create_folder(path: Path) -> Iterator[None]:
    """Create the folder of a result and hold it, so that no other process writes there too.

    Raises:
        InputError: if ``path`` exists and is not empty, or is held.
    """
    require_new_folder(path)
    path.mkdir(parents=True, exist_ok=True)
    with hold_folder(path):
        require_new_folder(path)  # Another process may have been first.
        yield


def create_numbered_folder(title: str) -> Path:
    """Create and return ``runs/TITLE-N`` with the lowest free N."""
    DEFAULT_PARENT.mkdir(exist_ok=True)
    slug = re.sub(r"[^A-Za-z0-9_.]+", "-", title).strip("-.")[:60] or "run"
    number = 1
    while True:
        path = DEFAULT_PARENT / f"{slug}-{number}"
        try:
            path.mkdir()
        except FileExistsError:
            number += 1
        else:
            return path


@contextlib.contextmanager
def hold_folder(path: Path) -> Iterator[None]:
    """Keep other processes, and other threads, from writing to a folder; nests.

    The lock is the operating system's own, on the file ``.lock``: it ends with the process, however
    the process ends. Reading needs no lock.

    Raises:
        InputError: if another process or thread holds it.
    """
    # Imported here, because most commands hold no folder.
    from filelock import FileLock, Timeout

    lock = FileLock(path / LOCK_FILE, is_singleton=True)
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise InputError(
            f"{path} is in use: another process is writing there; wait until it ends, or stop it"
        ) from error
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def hold_results(path: Path | None) -> Iterator[None]:
    """Create a folder of results unless it exists, and hold it; ``None`` holds nothing."""
    if path is None:
        yield
        return
    path.mkdir(parents=True, exist_ok=True)
    with hold_folder(path):
        yield


def is_in_use(path: Path) -> bool:
    """Whether another process or thread holds a folder."""
    if not (path / LOCK_FILE).is_file():
        return False
    try:
        with hold_folder(path):
            return False
    except InputError:
        return True
    except PermissionError:  # Asking takes the right to write.
        return False


@contextlib.contextmanager
def writing(what: Path | str, folder: Path) -> Iterator[None]:
    """Turn errors of writers, such as on a full disk, into a ``WriteError`` of one sentence."""
    from safetensors import SafetensorError

    try:
        yield
    except RunError:
        raise
    except Exception as error:
        # PyTorch's writer raises RuntimeError, that of tokenizers (in Rust) a plain Exception.
        known = OSError | RuntimeError | SafetensorError
        if not isinstance(error, known) and type(error) is not Exception:
            raise
        reason = explain(error)
        # PyTorch's writer does not say that the disk is full.
        if isinstance(error, RuntimeError) and shutil.disk_usage(folder).free < _FULL_BYTES:
            reason = "no space left on device"
        raise WriteError(f"cannot write {what}: {reason}") from error


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all, whenever the process or the machine stops.

    A reader finds either the old content or the new. Text is written as UTF-8.

    Raises:
        WriteError: if it cannot be written; the old content stays.
    """
    scratch = path.with_name(f"{path.name}.partial")
    with writing(path, path.parent):
        try:
            with scratch.open("wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(scratch, path)
        finally:
            with contextlib.suppress(OSError):
                scratch.unlink()


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write an object as JSON, whole or not at all."""
    write_file(path, json.dumps(values, indent=2) + "\n")


def write_record(run: Path, record: dict[str, Any]) -> None:
    """Write ``record.json``."""
    write_json(run / RECORD_FILE, {"format_version": FORMAT_VERSION, **record})


def read_run(run: Path) -> tuple[Recipe, dict[str, Any]]:
    """Return the recipe and the record of an existing run.

    Raises:
        InputError: if ``run`` is no run folder, is damaged, or was written by a later release.
    """
    require_unicode_path(run)
    if not (run / RECORD_FILE).is_file() or not (run / RECIPE_FILE).is_file():
        raise InputError(
            f"{run} holds no run to resume ({RECORD_FILE} or {RECIPE_FILE} is missing); "
            "leave --resume out to start one"
        )
    record = read_record(run, "start a new run", "format_version")
    version = record["format_version"]
    if version > FORMAT_VERSION:
        raise InputError(
            f"{run} has format version {version} and this release reads up to {FORMAT_VERSION}; "
            "upgrade unimatrix-lm"
        )
    return load_recipe(run / RECIPE_FILE), record


def read_record(folder: Path, advice: str, *needed: str) -> dict[str, Any]:
    """Return the content of a folder's ``record.json``.

    Raises:
        InputError: if it cannot be read, or lacks a field of ``needed``; the message ends with
            ``advice``.
    """
    path = folder / RECORD_FILE
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for name in needed:
            record[name]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged ({explain(error)}); {advice}") from error
    return record


def trim_metrics(run: Path, optim_step: int) -> None:
    """Drop the lines of ``metrics.jsonl`` about steps after ``optim_step``, and damaged lines."""
    path = run / METRICS_FILE
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    write_file(path, "".join(line for line in lines if _read_optim_step(line) <= optim_step))


def start_record(recipe: Recipe, config: dict[str, Any], device: str) -> dict[str, Any]:
    """Return what is known of a run before its first step."""
    return {
        "status": "training",
        "seed": recipe.train.seed,
        "config_sha256": hash_config(config),
        **describe_run(device),
    }


def describe_run(device: str) -> dict[str, Any]:
    """Return when, where and with which code something runs."""
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": describe_commit(),
        "device": device,
        "hardware": describe_hardware(),
        "versions": describe_versions(),
    }


def hash_config(config: dict[str, Any]) -> str:
    """Return the SHA-256 of a configuration, whatever the order of its fields."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def describe_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results depend on."""
    return {"python": platform.python_version()} | {p: metadata.version(p) for p in _PACKAGES}


def describe_hardware() -> dict[str, Any]:
    """Return platform, processors and accelerator."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "platform": platform.platform(),
        "processor": _read_processor(),
        "num_processors": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "gpu": gpu,
    }


def describe_commit() -> dict[str, Any] | None:
    """Return the commit of this code, and whether files differ from it; ``None`` outside git."""
    here = Path(__file__).parent
    if _ask_git(here, "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    head = _ask_git(here, "rev-parse", "HEAD")
    changes = _ask_git(here, "status", "--porcelain", "--untracked-files=no")
    return None if head is None else {"hash": head, "dirty": bool(changes)}


def _is_unfinished(path: Path) -> bool:
    """Whether a folder holds a run that can be resumed."""
    try:
        _, record = read_run(path)
    except InputError:
        return False
    return record.get("status") != "done"


def _read_optim_step(line: str) -> float:
    """Return the step of a line of ``metrics.jsonl``; infinity if the line is damaged."""
    try:
        entry = json.loads(line) if line.endswith("}\n") else {}
    except ValueError:
        entry = {}
    return float(entry.get("optim_step", "inf"))


def _ask_git(folder: Path, *arguments: str) -> str | None:
    try:
        answer = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=_GIT_TIMEOUT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def _read_processor() -> str:
    """Return the processor's name, which Linux has in a file only."""
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        for line in listing.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
