"""Whether compiled kernels can run in this process: asked before ``auto`` chooses them."""

import functools
import logging
from concurrent.futures import ThreadPoolExecutor

_logger = logging.getLogger("unimatrix")


@functools.cache
def explain_unusable() -> str | None:
    """Return why compiled kernels cannot run in this process, ``None`` if they can.

    The first call imports Numba and runs a small kernel whose results are known
    (``self_check``); where that fails, a warning says so once. Later calls cost nothing.
    """
    # A thread of its own has no modes of this one, such as autocast or fake tensors.
    with ThreadPoolExecutor(1) as thread:
        error = thread.submit(_run_self_check).exception()
    if error is None:
        return None
    first_line = (str(error).splitlines() or [""])[0]
    reason = f"{type(error).__name__}: {first_line}"
    _logger.warning(
        "unimatrix runs without its compiled kernels, several times slower: they do not work with "
        f"what is installed here ({reason}). Install a Numba that fits Python and NumPy "
        "(`pip install --upgrade numba numpy`); if this message stays, please report it."
    )
    return reason


def _run_self_check() -> None:
    """Import Numba and run the kernel; whatever is raised says that kernels cannot run."""
    from unimatrix.ops.numba.self_check import run_self_check

    run_self_check()
