"""A cell that trains a model within a budget of minutes, and goes on from its last checkpoint."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from unimatrix.hub.load import save_model
from unimatrix.studies.engine import Attempt, StoppedError, StudyCell
from unimatrix.studies.records import Record
from unimatrix.train.callbacks import NonFiniteError
from unimatrix.train.checkpoints import find_last_checkpoint
from unimatrix.train.plan import plan_steps
from unimatrix.train.recipe import TrainSection
from unimatrix.train.run_folder import (
    CHECKPOINT_FOLDER,
    METRICS_FILE,
    TENSORBOARD_FOLDER,
    describe_run,
    trim_metrics,
)
from unimatrix.train.trainer import train_model

# More than any budget buys.
_TRIAL_STEPS = 10**6
_CURVE_POINTS = 60


@dataclass(frozen=True, kw_only=True)
class TrainedCell(StudyCell):
    """What a cell trains, and how the trained model is judged.

    Attributes:
        build: returns the model with fresh weights.
        make_dataset: returns so many items in the order of the seed.
        train: the optimiser's settings, with neither steps nor minutes.
        steps: optimiser steps, if ``minutes`` allow them; ``None`` is as many as they allow.
        minutes: budget of training.
        judge: returns the results of the trained model, as JSON types.
    """

    needed = ("hardware", "num_optim_steps")
    scratch = (CHECKPOINT_FOLDER, TENSORBOARD_FOLDER)

    build: Callable[[], PreTrainedModel]
    make_dataset: Callable[[int], Dataset[dict[str, Tensor]]]
    train: TrainSection
    steps: int | None
    minutes: float
    judge: Callable[[PreTrainedModel], dict[str, Any]]

    def is_finished(self, record: Record) -> bool:
        """Return whether it was judged, or diverged, which is a result."""
        return record["status"] in ("done", "failed")

    def measure(self, attempt: Attempt) -> Record:
        """Train, judge and save the model; see ``StudyCell``."""
        assert attempt.folder is not None
        model, record = self.build(), attempt.record
        if record is None:
            record = attempt.write(self._plan(model, attempt.device))
        else:
            # Sums depend on how they are split over threads.
            torch.set_num_threads(record["hardware"]["num_threads"])
        try:
            record = self._train(model, record, attempt, attempt.folder)
        except NonFiniteError as error:
            return record | {"status": "failed", "error": str(error), "results": None}
        start = time.perf_counter()
        results = self.judge(model.to(attempt.device).eval())
        results |= {"eval_s": round(time.perf_counter() - start, 3)}
        save_model(model, attempt.folder)
        return record | {"status": "done", "results": results}

    def _plan(self, model: PreTrainedModel, device: str) -> Record:
        """Plan the steps by timing a few; return the record of a cell that begins."""
        limit = replace(self.train, minutes=self.minutes)
        plan = plan_steps(model, self.make_dataset(_TRIAL_STEPS), limit, device=device)
        return {
            "status": "training",
            "asked": self.settings,
            **describe_run(device),
            "num_optim_steps": min(self.steps or plan.num_steps, plan.num_steps),
            "planned_s_per_step": plan.seconds_per_step,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "train_s": 0.0,
        }

    def _train(
        self, model: PreTrainedModel, record: Record, attempt: Attempt, folder: Path
    ) -> Record:
        """Train, from the last checkpoint where there is one; return the record with its figures.

        Raises:
            StoppedError: if a callback ended the training; a checkpoint is saved.
        """
        num_steps = record["num_optim_steps"]
        checkpoint = find_last_checkpoint(folder, attempt.say)
        trim_metrics(folder, 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2]))
        dataset = self.make_dataset(num_steps * self.train.batch_size)
        settings = replace(self.train, steps=num_steps)
        trained = train_model(
            model,
            dataset,
            settings,
            folder,
            checkpoint=checkpoint,
            callbacks=attempt.callbacks,
            device=attempt.device,
            on_metrics=attempt.on_metrics,
        )
        record = record | {"train_s": round(record["train_s"] + trained.train_s, 3)}
        if trained.interrupted:
            attempt.write(record | {"status": "interrupted"})
            raise StoppedError(self.name)
        tokens = num_steps * self.train.batch_size * dataset[0]["input_ids"].numel()
        return attempt.write(
            record
            | {
                "status": "trained",
                "tokens": tokens,
                "tokens_per_s": round(tokens / record["train_s"], 1),
                "loss_curve": _read_curve(folder),
            }
        )


def _read_curve(folder: Path) -> list[list[float]]:
    """Return [optimiser step, loss in nats] of some entries of the log, evenly spread."""
    lines = (folder / METRICS_FILE).read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    groups = min(_CURVE_POINTS, len(entries))
    curve = []
    for group in range(groups):
        part = entries[group * len(entries) // groups : (group + 1) * len(entries) // groups]
        mean = sum(entry["loss_nats"] for entry in part) / len(part)
        curve.append([part[-1]["optim_step"], round(mean, 5)])
    return curve
