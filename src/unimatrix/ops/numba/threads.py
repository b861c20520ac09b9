"""Runs a compiled kernel over rows in as many threads as torch uses.

Where torch has threads of libgomp (``torch_threads``), these run it. Elsewhere, and in a forked
child, a thread pool does. Numba's own parallel layers are not safe to enter from several threads or
after a fork.
"""

import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from unimatrix.ops.numba.team import KNOWS_MACHINE, Shaped, run_in_team, to_array
from unimatrix.ops.numba.torch_threads import find_libgomp

__all__ = ["Shaped", "map_rows", "run_rows"]

_MIN_THREADED_WORK = 1 << 19  # multiply-adds; below, waking a thread costs more than it saves

_pool: ThreadPoolExecutor | None = None


def _drop_pool() -> None:
    """Forget the parent's pool, whose threads do not exist in a forked child."""
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_drop_pool)


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
    bounds = [num_rows * i // num_threads for i in range(num_threads + 1)]
    libgomp = find_libgomp()
    if libgomp is not None and KNOWS_MACHINE:
        # Also for a single span: that costs half of a call through the compiler's own dispatch.
        run_in_team(libgomp, kernel, bounds, args)
    else:
        _run_in_pool(kernel, bounds, args)


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
    contiguous = [x.contiguous() if isinstance(x, Tensor) else x for x in args]
    map_rows(kernel, num_rows, form, *contiguous, work=num_rows * work_per_row)


def _run_in_pool(kernel: Callable[..., Any], bounds: list[int], args: tuple[Any, ...]) -> None:
    """Run the span between the first two bounds in this thread and the others in the pool."""
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(thread_name_prefix="unimatrix")
    arrays = [to_array(x) if isinstance(x, Tensor | Shaped) else x for x in args]

    def run(span: tuple[int, int]) -> None:
        kernel(*span, *arrays)

    first, *others = itertools.pairwise(bounds)
    futures = [_pool.submit(run, span) for span in others]
    run(first)
    for future in futures:
        future.result()
