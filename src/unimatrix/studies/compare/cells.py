"""One cell of a comparison: train a model once, judge it, and never do it again.

A cell is a folder. ``record.json`` holds what was asked for and what came out; a cell that is done
is read back, one that was interrupted goes on from its last checkpoint.
"""

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel, TrainerCallback

from unimatrix.errors import InputError
from unimatrix.hub.load import save_model
from unimatrix.train.callbacks import NonFiniteError
from unimatrix.train.checkpoints import find_last_checkpoint
from unimatrix.train.plan import plan_steps
from unimatrix.train.recipe import TrainSection
from unimatrix.train.run_folder import (
    CHECKPOINT_FOLDER,
    METRICS_FILE,
    RECORD_FILE,
    TENSORBOARD_FOLDER,
    describe_run,
    read_record,
    trim_metrics,
    write_record,
)
from unimatrix.train.trainer import train_model

Record = dict[str, Any]
MakeDataset = Callable[[int], Dataset[dict[str, Tensor]]]

_TRIAL_STEPS = 10**6
_CURVE_POINTS = 60


class StoppedError(Exception):
    """The user asked to stop; what was done is kept."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What a cell trains.

    Attributes:
        name: its folder below the comparison's, which says what it is.
        asked: everything that decides its result, as JSON types.
        build: returns the model with fresh weights.
        make_dataset: returns so many items in the order of the seed.
        train: the optimiser's settings, with neither steps nor minutes.
        steps: optimiser steps, if ``minutes`` allow them; ``None`` is as many as they allow.
        minutes: budget of training.
        judge: returns the results of the trained model, as JSON types.
    """

    name: str
    asked: dict[str, Any]
    build: Callable[[], PreTrainedModel]
    make_dataset: MakeDataset
    train: TrainSection
    steps: int | None
    minutes: float
    judge: Callable[[PreTrainedModel], dict[str, Any]]


def run_cell(
    cell: Cell,
    folder: Path,
    device: str,
    *,
    callbacks: Sequence[TrainerCallback] = (),
    on_metrics: Callable[[dict[str, float]], None] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Record:
    """Return the record of a cell: read back, gone on with, or made.

    Args:
        cell: what to do.
        folder: of the comparison.
        device: cpu, cuda or mps.
        callbacks, on_metrics: as in ``train_model``.
        say: called with a sentence if the last checkpoint is not whole.

    Raises:
        InputError: if the folder holds a cell of this name that something else was asked of, or
            that is damaged.
        StoppedError: if a callback stopped the training; a checkpoint is saved.
    """
    path = folder / cell.name
    record = read_cell(path, cell.asked, "hardware", "num_optim_steps")
    if record is not None and record["status"] in ("done", "failed"):
        return record
    model = cell.build()
    if record is None:
        record = _start(cell, path, model, device)
    else:
        # Sums depend on how they are split over threads.
        torch.set_num_threads(record["hardware"]["num_threads"])
    try:
        checkpoint = find_last_checkpoint(path, say)
        record = _train(cell, path, model, record, checkpoint, device, callbacks, on_metrics)
    except NonFiniteError as error:
        record |= {"status": "failed", "error": str(error), "results": None}
        _tidy(path)
        return keep_record(path, record)
    start = time.perf_counter()
    model.to(device).eval()
    results = cell.judge(model)
    record |= {
        "status": "done",
        "results": results | {"eval_s": round(time.perf_counter() - start, 3)},
    }
    save_model(model, path)
    record = keep_record(path, record)
    _tidy(path)
    return record


def keep_record(path: Path, record: Record) -> Record:
    """Write a record and return it as it will be read back."""
    path.mkdir(parents=True, exist_ok=True)
    write_record(path, record)
    kept: Record = json.loads((path / RECORD_FILE).read_text(encoding="utf-8"))
    return kept


def read_cell(path: Path, asked: dict[str, Any], *needed: str) -> Record | None:
    """Return the record of a cell's folder; ``None`` if it was never begun.

    Args:
        path: the folder.
        asked: what would decide its result now.
        needed: fields that the record must have besides.

    Raises:
        InputError: if it is damaged, or something else was asked of it.
    """
    if not (path / RECORD_FILE).is_file():
        return None
    advice = f"delete {path} to run it again"
    record: Record = read_record(path, advice, "asked", "status", *needed)
    found = record["asked"]
    asked = json.loads(json.dumps(asked))
    if found != asked:
        changed = next(k for k in {**asked, **found} if found.get(k) != asked.get(k))
        raise InputError(
            f"{path} was made with another {changed}; choose another --out, or delete it"
        )
    return record


def _start(cell: Cell, path: Path, model: PreTrainedModel, device: str) -> Record:
    """Plan the steps by timing a few, and write what is known."""
    limit = replace(cell.train, minutes=cell.minutes)
    plan = plan_steps(model, cell.make_dataset(_TRIAL_STEPS), limit, device=device)
    num_steps = plan.num_steps if cell.steps is None else min(cell.steps, plan.num_steps)
    record = {
        "status": "training",
        "asked": cell.asked,
        **describe_run(device),
        "num_optim_steps": num_steps,
        "planned_s_per_step": plan.seconds_per_step,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "train_s": 0.0,
    }
    return keep_record(path, record)


def _train(
    cell: Cell,
    path: Path,
    model: PreTrainedModel,
    record: Record,
    checkpoint: Path | None,
    device: str,
    callbacks: Sequence[TrainerCallback],
    on_metrics: Callable[[dict[str, float]], None] | None,
) -> Record:
    """Train, from the last checkpoint where there is one; return the record brought up to date."""
    num_steps = record["num_optim_steps"]
    trim_metrics(path, 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2]))
    trained = train_model(
        model,
        cell.make_dataset(num_steps * cell.train.batch_size),
        replace(cell.train, steps=num_steps),
        path,
        checkpoint=checkpoint,
        callbacks=callbacks,
        device=device,
        on_metrics=on_metrics,
    )
    record = record | {"train_s": round(record["train_s"] + trained.train_s, 3)}
    if trained.interrupted:
        keep_record(path, record | {"status": "interrupted"})
        raise StoppedError(cell.name)
    tokens_per_step = cell.make_dataset(1)[0]["input_ids"].numel() * cell.train.batch_size
    record |= {
        "status": "trained",
        "tokens": num_steps * tokens_per_step,
        "tokens_per_s": round(num_steps * tokens_per_step / record["train_s"], 1),
        "loss_curve": _read_curve(path),
    }
    return keep_record(path, record)


def _read_curve(path: Path) -> list[list[float]]:
    """Return [optimiser step, loss in nats] of some entries of the log, evenly spread."""
    lines = (path / METRICS_FILE).read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    groups = min(_CURVE_POINTS, len(entries))
    curve = []
    for group in range(groups):
        part = entries[group * len(entries) // groups : (group + 1) * len(entries) // groups]
        mean = sum(entry["loss_nats"] for entry in part) / len(part)
        curve.append([part[-1]["optim_step"], round(mean, 5)])
    return curve


def _tidy(path: Path) -> None:
    """Delete what only an unfinished cell needs."""
    for folder in (CHECKPOINT_FOLDER, TENSORBOARD_FOLDER):
        shutil.rmtree(path / folder, ignore_errors=True)
