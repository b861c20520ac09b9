"""What glibc does with freed memory: kept between training steps, or given back."""

import ctypes
import functools
from collections.abc import Callable

# glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_NEVER = 2**31 - 1
_FIRST_THRESHOLD = 1 << 17  # that of a new process


def keep_freed_memory() -> bool:
    """Tell glibc to keep what is freed, for the rest of the process.

    A training step frees and asks for the same megabytes again. By default they go back to the
    system every time and come back as pages to be cleared (measured: a third of a step of 32 x 128
    tokens on the CPU).

    Returns:
        whether there is a glibc to tell; elsewhere nothing is done.
    """
    return _set_thresholds(_NEVER)


def give_freed_memory_back() -> bool:
    """Tell glibc to give back what is freed in blocks of 128 KiB and more, from now on.

    So it starts, but by itself it keeps blocks as large as the largest that was freed, and the peak
    bytes of a process then depend on all that it has done before.

    Returns:
        whether there is a glibc to tell.
    """
    return _set_thresholds(_FIRST_THRESHOLD)


@functools.cache
def _find_mallopt() -> Callable[[int, int], int] | None:
    """Return glibc's function, ``None`` elsewhere."""
    try:
        found: Callable[[int, int], int] = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # Windows has no process-wide library
        return None
    return found


def _set_thresholds(num_bytes: int) -> bool:
    """Set from where on blocks are mapped alone, and free memory at the end is given back."""
    mallopt = _find_mallopt()
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, num_bytes) and mallopt(_M_TRIM_THRESHOLD, num_bytes))
