"""Bytes of this process: the most that it holds while it does something, and a limit for it.

Resident bytes, not what an allocator counts: kernels, the suffix automaton and torch's own buffers
all show. The peak of a process never falls by itself, so it is set back first where the system can
(Linux), and each measurement is best made in a process of its own: what earlier work left with the
allocator would otherwise hide what the next one needs.
"""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch

from unimatrix.bench.clock import time_call

_STATUS, _MACHINE = Path("/proc/self/status"), Path("/proc/meminfo")
_BYTES_SHARE = 0.8  # of the bytes that are free


def measure_peak_bytes(work: Callable[[], object], device: str) -> tuple[int | None, float]:
    """Run something once and return its peak bytes, net of what was held before, and its seconds.

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
        seconds = time_call(work, device)
        return torch.cuda.max_memory_allocated() - before, seconds
    _return_freed_bytes()
    is_known = device == "cpu" and _forget_peak()
    before = _read_bytes(_STATUS, "VmRSS") if is_known else 0
    seconds = time_call(work, device)
    return max(0, _read_bytes(_STATUS, "VmHWM") - before) if is_known else None, seconds


def limit_bytes(device: str) -> int:
    """Return the bytes that are free on a CPU or GPU, and refuse this process most of a CPU's.

    Returns:
        0 where they cannot be known, and there is then no limit.
    """
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    available = _read_bytes(_MACHINE, "MemAvailable") if device == "cpu" else 0
    if available:
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        most = _read_bytes(_STATUS, "VmData") + int(_BYTES_SHARE * available)
        resource.setrlimit(resource.RLIMIT_DATA, (most, hard))
    return available


def is_out_of_bytes(error: BaseException) -> bool:
    """Return whether an error says that no more bytes were to be had."""
    signs = ("can't allocate memory", "not enough memory", "out of memory", "cannot allocate")
    return isinstance(error, MemoryError) or any(sign in str(error).lower() for sign in signs)


def _return_freed_bytes() -> None:
    """Let glibc give freed bytes back, so that they do not count as used."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError, TypeError):  # another C library
        return


def _forget_peak() -> bool:
    """Set the peak of this process back to what it holds now; return whether that worked."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return _STATUS.is_file()


def _read_bytes(listing: Path, name: str) -> int:
    """Return a figure that Linux lists in kibibytes, in bytes; 0 where there is no such list."""
    if listing.is_file():
        for line in listing.read_text(encoding="utf-8").splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return 0
