"""The processes of a data-parallel run: one process unless torchrun started several."""

import logging
from collections.abc import Callable
from typing import TypeVar, cast

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import distributed

T = TypeVar("T")


def join_processes(device: str) -> None:
    """Meet the other processes that torchrun started, if it did; the first alone warns."""
    PartialState(cpu=device == "cpu")
    if not is_main_process():
        logging.getLogger("unimatrix").setLevel(logging.ERROR)


def leave_processes() -> None:
    """Wait for the other processes and leave their group."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


def is_main_process() -> bool:
    """Whether this process is the one that prints and writes."""
    return get_rank() == 0


def get_rank() -> int:
    """Return this process's number, from 0."""
    return distributed.get_rank() if _are_several() else 0


def count_processes() -> int:
    """Return the number of processes."""
    return distributed.get_world_size() if _are_several() else 1


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether ``flag`` is true in any process; every process must call this."""
    if not _are_several():
        return flag
    votes = torch.tensor(int(flag), device=device)
    distributed.all_reduce(votes, op=distributed.ReduceOp.MAX)
    return bool(votes.item())


def share(value: T) -> T:
    """Return the main process's ``value``; every process must call this."""
    values = [value]
    if _are_several():
        broadcast_object_list(values)
    return values[0]


def run_in_main(act: Callable[[], T]) -> T:
    """Run ``act`` in the main process alone; every process must call this.

    Returns:
        in every process, what ``act`` returned.

    Raises:
        in every process, what ``act`` raised, so that none waits for a process that is gone.
    """
    value: T | None = None
    error: Exception | None = None
    if is_main_process():
        try:
            value = act()
        except (OSError, RuntimeError, ValueError) as raised:
            error = raised
    value, error = share((value, error))
    if error is not None:
        raise error
    return cast(T, value)


def _are_several() -> bool:
    return distributed.is_available() and distributed.is_initialized()
