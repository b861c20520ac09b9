"""Keeps freed memory in the process between training steps."""

import ctypes
import functools

# glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_NEVER = 2**31 - 1


@functools.cache
def keep_freed_memory() -> bool:
    """Tell glibc to keep what is freed, for the rest of the process.

    A training step frees and asks for the same megabytes again. By default they go back to the
    system every time and come back as pages to be cleared (measured: a third of a step of 32 x 128
    tokens on the CPU).

    Returns:
        whether there is a glibc to tell; elsewhere nothing is done.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # Windows has no process-wide library
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _NEVER) and mallopt(_M_TRIM_THRESHOLD, _NEVER))
