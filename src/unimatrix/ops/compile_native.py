"""How loops are compiled: kernels that Python calls, and parts that only kernels call.

A kernel is compiled once for its types and kept on disk. What lets Python call a function costs as
much to compile as a small function, so a part has none of it (and must not be called from Python),
and no file: it is compiled into its kernels.
"""

from typing import Any

import numba


def kernel(**options: Any) -> Any:
    """Return the decorator of a function that Python or ``threads.map_rows`` calls.

    Args:
        options: of ``numba.njit``.
    """
    return numba.njit(nogil=True, cache=True, **options)


def part(**options: Any) -> Any:
    """Return the decorator of a function that kernels and other parts alone call.

    Args:
        options: of ``numba.njit``.
    """
    return numba.njit(nogil=True, no_cpython_wrapper=True, no_cfunc_wrapper=True, **options)
