"""How loops are compiled: kernels that Python calls, and parts that only kernels call.

A kernel is compiled once for its types and kept on disk (``cache_native``). What lets Python call a
function costs as much to compile as a small function, so a part has none of it (and must not be
called from Python), and no file: it is compiled into its kernels.
"""

from typing import Any

import numba
from numba.core.ccallback import CFunc
from numba.core.sigutils import normalize_signature

from unimatrix.ops.cache_native import KernelCache


def kernel(**options: Any) -> Any:
    """Return the decorator of a function that Python or ``threads.map_rows`` calls.

    Args:
        options: of ``numba.njit``.
    """

    def decorate(function: Any) -> Any:
        compiled = numba.njit(nogil=True, **options)(function)
        # Set where `cache=True` sets Numba's own, which looks at the file of the kernel alone.
        compiled._cache = KernelCache(function)
        return compiled

    return decorate


def part(**options: Any) -> Any:
    """Return the decorator of a function that kernels and other parts alone call.

    Args:
        options: of ``numba.njit``.
    """
    return numba.njit(nogil=True, no_cpython_wrapper=True, no_cfunc_wrapper=True, **options)


def callback(signature: str) -> Any:
    """Return the decorator of a function that C calls by its address; kept on disk like a kernel.

    Args:
        signature: its types, as for ``numba.cfunc``.
    """

    def decorate(function: Any) -> Any:
        compiled: Any = CFunc(function, normalize_signature(signature), locals={}, options={})
        compiled._cache = KernelCache(function)
        compiled.compile()
        return compiled

    return decorate
