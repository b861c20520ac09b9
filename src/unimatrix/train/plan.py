"""How many steps fit a budget in minutes: copies of the model are trained for a few seconds."""

import copy
import time
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel, TrainerCallback
from transformers import TrainerControl as Control
from transformers import TrainerState as State
from transformers import TrainingArguments as Arguments

from unimatrix.train.processes import any_process, count_processes
from unimatrix.train.recipe import TrainSection
from unimatrix.train.trainer import train_model

BUDGET_SHARE = 0.97
"""The share of a budget in minutes that is planned; the rest is for checkpoints and stalls."""
_UNTIMED_STEPS = 3
_LEAST_TIMED_STEPS = 3
_WARMUP_SHARE = 0.03
_LONGEST_WARMUP_S = 4.0


class StepTimer(TrainerCallback):
    """Time steps after the first few, then stop the training."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._ends: list[float] = []

    @property
    def timed_s(self) -> float:
        """Return the seconds that the timed steps took together."""
        return self._ends[-1] - self._ends[_UNTIMED_STEPS - 1]

    @property
    def seconds_per_step(self) -> float:
        """Return the mean of the timed steps."""
        return self.timed_s / (len(self._ends) - _UNTIMED_STEPS)

    def on_step_end(self, args: Arguments, state: State, control: Control, **_: Any) -> None:
        """Note the time; stop when enough was seen."""
        self._ends.append(time.perf_counter())
        enough = len(self._ends) >= _UNTIMED_STEPS + _LEAST_TIMED_STEPS
        if any_process(enough and self.timed_s >= self.seconds, args.device):
            control.should_training_stop = True


class StepPlan(NamedTuple):
    """What a budget in minutes buys.

    Attributes:
        num_steps: at least 1.
        seconds_per_step: as timed.
        num_threads: CPU threads that were timed, and are in use from now on.
    """

    num_steps: int
    seconds_per_step: float
    num_threads: int


def plan_steps(
    model: PreTrainedModel,
    dataset: Dataset[dict[str, Tensor]],
    settings: TrainSection,
    *,
    device: str = "cpu",
) -> StepPlan:
    """Find out how many steps fit ``settings.minutes`` by training copies for a few seconds.

    The first steps, which compile and allocate, are not timed; the timed steps count towards the
    budget. On the CPU one thread is timed beside all of them: waking a second thread can cost more
    than it saves in a small step, and far more on a machine that has other work.

    Args:
        model: left as it is.
        dataset: items to train the copies on, more than a trial can use up.
        settings: with ``minutes``.
        device: cpu, cuda or mps.
    """
    assert settings.minutes is not None
    budget_s = settings.minutes * 60
    num_trial_steps = len(dataset) // settings.batch_size  # type: ignore[arg-type]
    trial = replace(settings, minutes=None, steps=num_trial_steps)
    timers = {}
    for num_threads in _list_thread_counts(settings, device):
        torch.set_num_threads(num_threads)
        timer = timers[num_threads] = StepTimer(min(_LONGEST_WARMUP_S, _WARMUP_SHARE * budget_s))
        train_model(copy.deepcopy(model), dataset, trial, None, callbacks=[timer], device=device)
    num_threads = min(timers, key=lambda number: timers[number].seconds_per_step)
    torch.set_num_threads(num_threads)
    seconds_per_step = timers[num_threads].seconds_per_step
    left_s = budget_s - sum(timer.timed_s for timer in timers.values())
    return StepPlan(
        max(1, int(BUDGET_SHARE * left_s / seconds_per_step)), seconds_per_step, num_threads
    )


def _list_thread_counts(settings: TrainSection, device: str) -> list[int]:
    """Return the numbers of CPU threads worth timing."""
    if settings.num_threads is not None:
        return [settings.num_threads]
    present = torch.get_num_threads()
    if device != "cpu" or count_processes() > 1:
        return [present]
    return sorted({1, present})
