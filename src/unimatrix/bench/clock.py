"""Interleaved timing: in every round each workload runs once, so drift slows all of them."""

import contextlib
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch

Key = TypeVar("Key", bound=Hashable)


class Workload(NamedTuple):
    """Something that is timed again and again.

    Attributes:
        prepare: makes what one run consumes; not timed.
        run: is timed; takes what ``prepare`` made.
    """

    prepare: Callable[[], Any]
    run: Callable[[Any], Any]


class Spread(NamedTuple):
    """The seconds of one workload over its rounds: of all, of the fastest, of the slowest."""

    median: float
    fastest: float
    slowest: float
    rounds: int

    def to_milliseconds(self, parts: int = 1) -> dict[str, float]:
        """Return the columns of a row for one of the equal parts of a run."""
        names = {"median_ms": self.median, "fastest_ms": self.fastest, "slowest_ms": self.slowest}
        milliseconds = {name: 1e3 * seconds / parts for name, seconds in names.items()}
        return {"rounds": self.rounds, **milliseconds}


def time_call(call: Callable[[], object], device: str) -> float:
    """Return the seconds until a device (cpu, cuda or mps) has done what a call tells it to do."""
    _synchronize(device)
    start = time.perf_counter()
    call()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
    elif device == "mps":
        torch.mps.synchronize()


def time_once(workload: Workload, device: str) -> float:
    """Return the seconds of one run."""
    prepared = workload.prepare()
    return time_call(lambda: workload.run(prepared), device)


def time_interleaved(
    workloads: Mapping[Key, Workload],
    num_rounds: Mapping[Key, int],
    *,
    device: str,
    on_round: Callable[[], None] = lambda: None,
) -> dict[Key, list[float]]:
    """Time workloads in turn, round after round, after one run of each that does not count.

    Every round starts with another workload, so that none always follows the same one.

    Args:
        workloads: by any key.
        num_rounds: how many rounds each takes part in, from the first on; at least 1.
        device: cpu, cuda or mps.
        on_round: called before every round, the uncounted one included.

    Returns:
        the seconds of each workload, round by round; none for one that a GPU has no room for beside
        the others.
    """
    seconds: dict[Key, list[float]] = {key: [] for key in workloads}
    fitting = []
    on_round()
    for key, workload in workloads.items():
        with contextlib.suppress(torch.OutOfMemoryError):
            time_once(workload, device)
            fitting.append(key)
    for index in range(max((num_rounds[key] for key in fitting), default=0)):
        on_round()
        due = [key for key in fitting if index < num_rounds[key]]
        first = index % len(due)
        for key in due[first:] + due[:first]:
            seconds[key].append(time_once(workloads[key], device))
    return seconds


def choose_rounds(num_rounds: int, budget_s: float, run_s: float) -> int:
    """Return the wanted number of rounds, or as many as fit the budget, at least one."""
    return min(num_rounds, max(1, int(budget_s / max(run_s, 1e-9))))


def summarize(seconds: list[float]) -> Spread:
    """Return median and range of at least one round."""
    return Spread(statistics.median(seconds), min(seconds), max(seconds), len(seconds))


def compare_rounds(ours: list[float], theirs: list[float]) -> float:
    """Return the median of ours over theirs, over the rounds that both took part in."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=False))
