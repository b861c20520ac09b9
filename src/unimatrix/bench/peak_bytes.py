"""The bytes that a process holds at most while it does something, net of what it held before.

Resident bytes, not what an allocator counts: kernels, the suffix automaton and torch's own buffers
all show. The peak of a process never falls by itself, so it is set back first where the system can
(Linux), and each measurement is best made in a process of its own: what earlier work left with the
allocator would otherwise hide what the next one needs.
"""

import ctypes
import gc
import time
from collections.abc import Callable
from pathlib import Path

import torch

from unimatrix.bench.clock import synchronize

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_FORGET_PEAK = "5"


def measure_peak_bytes(work: Callable[[], object], device: str) -> tuple[int | None, float]:
    """Run something once and return its peak bytes, net, and its seconds.

    Args:
        work: what is measured.
        device: on ``cuda`` the bytes of torch's allocator there; else those of this process.

    Returns:
        the bytes, ``None`` where they cannot be known (no Linux, or MPS); and the seconds.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        seconds = _time_work(work, device)
        return torch.cuda.max_memory_allocated() - before, seconds
    _return_freed_bytes()
    can_tell = device == "cpu" and _forget_peak()
    before = _read_status("VmRSS") if can_tell else 0
    seconds = _time_work(work, device)
    return max(0, _read_status("VmHWM") - before) if can_tell else None, seconds


def _time_work(work: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def _return_freed_bytes() -> None:
    """Let glibc give freed bytes back, so that they are not taken for ones in use."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError, TypeError):  # another C library
        return


def _forget_peak() -> bool:
    """Set the peak of this process back to what it holds now; return whether that worked."""
    try:
        _CLEAR.write_text(_FORGET_PEAK)
    except OSError:
        return False
    return _STATUS.is_file()


def _read_status(name: str) -> int:
    """Return a figure of this process that Linux gives in kibibytes, in bytes."""
    for line in _STATUS.read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(name)
