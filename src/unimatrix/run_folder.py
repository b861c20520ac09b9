"""The folder of one training run: what lies where, and the record of how it came about.

``config.json``, ``model.safetensors``, the tokenizer's files and ``load_unimatrix.py``, by which
``trust_remote_code=True`` finds this package, make the folder a saved model;
``recipe.json``, ``record.json``, ``metrics.jsonl``, ``tensorboard/`` and ``checkpoints/`` tell how
it was made.
"""

import hashlib
import json
import os
import platform
import re
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from unimatrix.errors import InputError
from unimatrix.recipe import Recipe, load_recipe

FORMAT_VERSION = 1
RECIPE_FILE = "recipe.json"
RECORD_FILE = "record.json"
METRICS_FILE = "metrics.jsonl"
CHECKPOINT_FOLDER = "checkpoints"
TENSORBOARD_FOLDER = "tensorboard"
DEFAULT_PARENT = Path("runs")

_PACKAGES = ("unimatrix-lm", "torch", "transformers", "accelerate", "numba", "numpy", "tokenizers")
_GIT_TIMEOUT_S = 10


def require_unicode_path(path: Path) -> None:
    """Raise ``InputError`` for a path that is not UTF-8: weights and logs cannot be written there.

    safetensors, tokenizers and TensorBoard open none. Data may lie at such paths.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{str(path)!r} is not UTF-8, and models are saved and loaded under such names only; "
            "choose another name"
        ) from error


def require_new_folder(path: Path, *, resumable: bool = True) -> None:
    """Raise ``InputError`` unless ``path`` is missing or an empty folder.

    Args:
        path: the folder wanted.
        resumable: what is there may be a run that ``--resume`` continues.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        is_run = resumable and (path / RECORD_FILE).is_file()
        advice = "add --resume to continue it, or" if is_run else "please"
        raise InputError(f"{path} already exists and is not empty; {advice} choose another --out")


def create_run_folder(out: Path | None, title: str) -> Path:
    """Create and return the folder of a new run.

    Args:
        out: where the user wants it; ``None`` is ``runs/TITLE-N`` with the lowest free N.
        title: what tells runs apart, such as preset and corpus; made fit for a file name.

    Raises:
        InputError: if ``out`` exists and is not empty.
    """
    if out is not None:
        require_new_folder(out)
        out.mkdir(parents=True, exist_ok=True)
        return out
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


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write an object as JSON, whole or not at all."""
    scratch = path.with_suffix(".partial")
    scratch.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    os.replace(scratch, path)


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
    try:
        record = json.loads((run / RECORD_FILE).read_text(encoding="utf-8"))
        version = record["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{run / RECORD_FILE} is damaged ({error}); start a new run") from error
    if version > FORMAT_VERSION:
        raise InputError(
            f"{run} has format version {version} and this release reads up to {FORMAT_VERSION}; "
            "upgrade unimatrix-lm"
        )
    return load_recipe(run / RECIPE_FILE), record


def find_last_checkpoint(run: Path) -> Path | None:
    """Return the latest complete checkpoint of a run, if there is one."""
    found = {}
    for path in (run / CHECKPOINT_FOLDER).glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        # The Trainer writes this file last.
        if number.isdecimal() and (path / "trainer_state.json").is_file():
            found[int(number)] = path
    return found[max(found)] if found else None


def trim_metrics(run: Path, optim_step: int) -> None:
    """Drop what ``metrics.jsonl`` says about steps after ``optim_step``: they will be repeated."""
    path = run / METRICS_FILE
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("}\n")]
    kept = [line for line in whole if json.loads(line)["optim_step"] <= optim_step]
    path.write_text("".join(kept), encoding="utf-8")


def start_record(recipe: Recipe, config: dict[str, Any], device: str) -> dict[str, Any]:
    """Return what is known of a run before its first step.

    Args:
        recipe: the resolved recipe.
        config: the model's configuration as a JSON object.
        device: where it trains.
    """
    return {
        "status": "training",
        "seed": recipe.train.seed,
        "config_sha256": hash_config(config),
        **describe_run(device),
    }


def describe_run(device: str) -> dict[str, Any]:
    """Return when, where and with which code something runs.

    Args:
        device: cpu, cuda or mps.
    """
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
    """Return the versions of Python and of the packages that move numbers."""
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
    """Return the commit of this code and whether it was changed since; ``None`` outside git."""
    here = Path(__file__).parent
    if _ask_git(here, "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    head = _ask_git(here, "rev-parse", "HEAD")
    changes = _ask_git(here, "status", "--porcelain", "--untracked-files=no")
    return None if head is None else {"hash": head, "dirty": bool(changes)}


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
    """Return the processor's name; Linux tells it in a file only."""
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        for line in listing.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
