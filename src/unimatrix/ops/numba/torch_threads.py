"""Torch's own CPU threads: how to reach them, and a mode of the processor that each of them has.

On Linux they belong to libgomp, and between two operators they spin, each keeping a core busy for
milliseconds. Threads of another kind would share the cores with them (measured: a kernel takes
twice as long on two cores), so kernels run on the same threads. Nothing here loads Numba.
"""

import contextlib
import ctypes
import functools
import os
import threading
from collections.abc import Callable, Iterator

import torch

_TeamFunction = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

_thread = threading.local()
_is_forked = False


def _note_fork() -> None:
    """Remember that libgomp has lost its threads: a forked child has only the one that forked."""
    global _is_forked
    _is_forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def find_libgomp() -> ctypes.CDLL | None:
    """Return torch's libgomp, ``None`` where torch has none or the process is a forked child."""
    return None if _is_forked else _load_libgomp()


@functools.cache
def _load_libgomp() -> ctypes.CDLL | None:
    """Return the libgomp that this process has loaded with torch, if it has."""
    try:
        with open("/proc/self/maps", errors="surrogateescape") as maps:
            paths = {line.split(maxsplit=5)[-1].strip() for line in maps if "libgomp" in line}
    except OSError:
        return None
    of_torch = sorted(path for path in paths if f"{os.sep}torch" in path)
    if not of_torch:
        return None
    libgomp = ctypes.CDLL(of_torch[0])
    # Function, its argument, threads, flags: what a compiler calls for `#pragma omp parallel`.
    libgomp.GOMP_parallel.argtypes = [
        *(ctypes.c_void_p, ctypes.c_void_p),
        *(ctypes.c_uint, ctypes.c_uint),
    ]
    libgomp.GOMP_parallel.restype = None
    return libgomp


@contextlib.contextmanager
def flush_denormals() -> Iterator[None]:
    """Let torch's CPU threads take numbers below 1e-38 for zero; off when the context ends.

    A gradient that fades over many tokens gets that small, and a processor multiplies such numbers
    many times slower (measured: three times on a step with one target at the end of 128 tokens).
    """
    _set_flush_denormal(True)
    try:
        yield
    finally:
        _set_flush_denormal(False)


def _set_flush_denormal(mode: bool) -> None:
    """Set the mode of this thread and of torch's others, each of which has its own."""
    libgomp, num_threads = find_libgomp(), torch.get_num_threads()
    if libgomp is None or num_threads == 1:
        torch.set_flush_denormal(mode)
    else:
        _call_in_every_thread(libgomp, num_threads, lambda: torch.set_flush_denormal(mode))


def _call_in_every_thread(
    libgomp: ctypes.CDLL, num_threads: int, function: Callable[[], object]
) -> None:
    """Call a Python function, which must not raise, once in each thread of a team of libgomp's."""

    def run(_: int | None) -> None:
        # A thread of libgomp otherwise gets a new interpreter state in every callback (50
        # microseconds measured): the first callback takes one that is never given back.
        if not hasattr(_thread, "keeps_state"):
            ctypes.pythonapi.PyGILState_Ensure()
            _thread.keeps_state = True
        function()

    team_function = _TeamFunction(run)
    libgomp.GOMP_parallel(ctypes.cast(team_function, ctypes.c_void_p), None, num_threads, 0)
