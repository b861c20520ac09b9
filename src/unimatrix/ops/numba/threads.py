"""Runs a compiled kernel over rows in a few threads: torch's own, or a plain pool.

On Linux torch's threads belong to libgomp, and between two operators they spin, each keeping a
core busy for milliseconds. Other threads would share the cores with them (measured: twice the time
of a kernel on two cores), so kernels are handed to the same threads. Where there is no libgomp,
and in a forked child, whose libgomp has lost its threads, a thread pool runs them. Numba's own
parallel layers are not safe to enter from several threads or after a fork.
"""

import contextlib
import ctypes
import functools
import itertools
import os
import platform
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

_ParallelBody = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

# ``team_native`` knows their calling conventions.
_MACHINE_IS_KNOWN = platform.machine() in ("x86_64", "aarch64")
_MIN_THREADED_WORK = 1 << 19  # multiply-adds; below, waking a thread costs more than it saves

_thread = threading.local()
_is_forked = False
_pool: ThreadPoolExecutor | None = None


def _note_fork() -> None:
    """Remember that the parent's threads do not exist here."""
    global _is_forked, _pool
    _is_forked, _pool = True, None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


class Shaped:
    """A tensor that a kernel sees as an array of its shape, where others are flat."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def map_rows(
    kernel: Callable[..., Any], num_rows: int, *args: Any, work: int | None = None
) -> None:
    """Call ``kernel(first_row, last_row, *args)`` so that all rows are covered once.

    Args:
        kernel: a ``nogil`` compiled function that handles rows ``first_row <= row < last_row``.
        num_rows: number of independent rows; split over as many threads as torch uses.
        args: contiguous tensors (the kernel sees flat arrays), ``Shaped`` ones, whole numbers and
            tuples of them; the kernel writes its results into the tensors.
        work: multiply-adds in all, roughly; for few, one thread is done before another has started.
            ``None`` is many.
    """
    is_small = work is not None and work < _MIN_THREADED_WORK
    num_threads = 1 if is_small else max(1, min(torch.get_num_threads(), num_rows))
    _run_spans(kernel, [num_rows * i // num_threads for i in range(num_threads + 1)], args)


def run_rows(
    kernel: Callable[..., None],
    form: tuple[Any, ...],
    num_rows: int,
    work_per_row: int,
    *args: Tensor | int,
) -> None:
    """Call ``kernel(first_row, last_row, form, *args)``, by as many threads as are worth it.

    Args:
        kernel: as in ``map_rows``; it sees tensors as flat arrays.
        form: what the kernel is compiled for.
        num_rows: number of independent rows.
        work_per_row: multiply-adds of a row, roughly.
        args: tensors and whole numbers; a tensor that is written must be contiguous.
    """
    given = [x.contiguous() if isinstance(x, Tensor) else x for x in args]
    map_rows(kernel, num_rows, form, *given, work=num_rows * work_per_row)


def _run_spans(kernel: Callable[..., Any], bounds: list[int], args: tuple[Any, ...]) -> None:
    """Call ``kernel(first, last, *args)`` for every span between two bounds, a thread for each."""
    libgomp = None if _is_forked else _find_libgomp()
    if libgomp is not None and _MACHINE_IS_KNOWN:
        # Imported here: it loads the compiler. Also for a single span: it costs half of a call
        # through the compiler's own dispatch.
        from unimatrix.ops.numba.team import run_in_team

        run_in_team(libgomp, kernel, bounds, args)
        return
    arrays = _to_arrays(args)
    _run_in_pool(
        [
            functools.partial(kernel, first, last, *arrays)
            for first, last in itertools.pairwise(bounds)
        ]
    )


def _to_arrays(args: Sequence[Any]) -> list[Any]:
    """Return tensors as arrays; anything else as it is."""
    return [to_array(x) if isinstance(x, Tensor | Shaped) else x for x in args]


def to_array(value: Tensor | Shaped) -> Any:
    """Return the array that a kernel sees."""
    if isinstance(value, Shaped):
        return value.tensor.detach().numpy()
    return value.detach().view(-1).numpy()


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
    num_threads = torch.get_num_threads()
    barrier = threading.Barrier(num_threads)

    def work() -> None:
        torch.set_flush_denormal(mode)
        # No thread may take a second call before every thread has taken one.
        with contextlib.suppress(threading.BrokenBarrierError):
            barrier.wait(timeout=1.0)

    libgomp = None if _is_forked else _find_libgomp()
    if libgomp is None or num_threads == 1:
        torch.set_flush_denormal(mode)
    else:
        _run_in_libgomp(libgomp, [work] * num_threads)


@functools.cache
def _find_libgomp() -> ctypes.CDLL | None:
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
    libgomp.GOMP_parallel.argtypes = [
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_uint,
        ctypes.c_uint,
    ]
    libgomp.GOMP_parallel.restype = None
    return libgomp


def _run_in_libgomp(libgomp: ctypes.CDLL, calls: Sequence[Callable[[], Any]]) -> None:
    """Run every call in a team of libgomp's threads."""
    waiting = iter(calls)
    errors: list[BaseException] = []

    def work(_: int | None) -> None:
        _keep_thread_state()
        # A team may come smaller than asked for, so each thread takes calls until none is left.
        # ``next`` holds the interpreter's lock: no call is taken twice.
        try:
            for call in waiting:
                call()
        except BaseException as error:
            errors.append(error)

    body = _ParallelBody(work)
    libgomp.GOMP_parallel(ctypes.cast(body, ctypes.c_void_p), None, len(calls), 0)
    if errors:
        raise errors[0]


def _keep_thread_state() -> None:
    """Let this thread keep its interpreter state after the callback it is in.

    A thread of libgomp otherwise gets a new state in every callback (50 microseconds measured).
    """
    if not hasattr(_thread, "keeps_state"):
        ctypes.pythonapi.PyGILState_Ensure()
        _thread.keeps_state = True


def _run_in_pool(calls: Sequence[Callable[[], Any]]) -> None:
    """Run the first call in this thread and the others in the pool."""
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(thread_name_prefix="unimatrix")
    futures = [_pool.submit(call) for call in calls[1:]]
    calls[0]()
    for future in futures:
        future.result()
