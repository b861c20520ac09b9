"""Runs a compiled kernel over rows in a few threads.

Numba's own parallel layers are not safe to enter from several threads or after a fork; kernels
compiled with ``nogil=True`` and a plain thread pool are.
"""

import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

_pool: ThreadPoolExecutor | None = None


def _forget_pool() -> None:
    """Drop the pool: its threads do not exist in a forked child."""
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)


def map_rows(kernel: Callable[..., Any], num_rows: int, *args: Any) -> None:
    """Call ``kernel(first_row, last_row, *args)`` so that all rows are covered once.

    Args:
        kernel: a ``nogil`` compiled function that handles rows ``first_row <= row < last_row``.
        num_rows: number of independent rows; split over as many threads as torch uses.
        args: passed on unchanged; the kernel writes its results into them.
    """
    global _pool
    num_threads = min(torch.get_num_threads(), num_rows)
    if num_threads <= 1:
        kernel(0, num_rows, *args)
        return
    if _pool is None:
        _pool = ThreadPoolExecutor(thread_name_prefix="unimatrix")
    bounds = [num_rows * i // num_threads for i in range(num_threads + 1)]
    futures = [
        _pool.submit(kernel, first, last, *args) for first, last in itertools.pairwise(bounds[1:])
    ]
    kernel(bounds[0], bounds[1], *args)
    for future in futures:
        future.result()
