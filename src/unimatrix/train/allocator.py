"""Tell glibc to keep freed memory between training steps, or to give it back."""

import ctypes
import functools
from collections.abc import Callable

# glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_NEVER = 2**31 - 1
_FIRST_THRESHOLD = 1 << 17  # that of a new process


def keep_freed_memory() -> bool:
    """Tell glibc to keep what is freed, for the rest of the process; return whether it can.

    A training step frees megabytes and asks for the same amount again. By default glibc returns
    them to the system every time, which then clears the pages (measured: a third of a step of 32 x
    128 tokens on the CPU).
    """
    return _set_thresholds(_NEVER)


def give_freed_memory_back() -> bool:
    """Tell glibc to give back freed blocks of 128 KiB and more; return whether it can.

    That is the rule of a new process. glibc then raises its threshold to the largest block freed so
    far, which makes the peak bytes of a process depend on all that it did before.
    """
    return _set_thresholds(_FIRST_THRESHOLD)


@functools.cache
def _find_mallopt() -> Callable[[int, int], int] | None:
    """Return glibc's function; ``None`` on other systems."""
    try:
        found: Callable[[int, int], int] = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # Windows has no process-wide library
        return None
    return found


def _set_thresholds(num_bytes: int) -> bool:
    """Set the size from which blocks are mapped by themselves, and free memory is given back."""
    mallopt = _find_mallopt()
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, num_bytes) and mallopt(_M_TRIM_THRESHOLD, num_bytes))
