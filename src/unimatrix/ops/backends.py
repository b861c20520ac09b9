"""Which back ends each operator has, and what an unusable request says.

``auto`` chooses; any other name runs or raises. Tests take their (operator, back end) pairs from
this table, so a back end added here is compared with its reference the same day.
"""

import importlib.util

import torch

from unimatrix.errors import InputError, suggest
from unimatrix.ops.checks import is_transformed
from unimatrix.ops.numba.health import explain_unusable

BACKENDS: dict[str, tuple[str, ...]] = {
    "matrix_state": ("reference", "parallel", "native", "triton"),
    "slots": ("reference", "parallel", "native", "triton"),
    "selective_slots": ("reference", "native", "triton"),
    "dense_memory": ("reference", "parallel"),
    "suffix_automaton": ("reference", "native"),
    "indexed_attention": ("reference", "native"),
    "fused_passes": ("reference", "native"),
}

# Of an NVIDIA GPU that Triton compiles for.
_LOWEST_CAPABILITY = (8, 0)


def require_backend(op: str, backend: str) -> str:
    """Return ``backend`` if ``op`` has it.

    Args:
        op: a key of ``BACKENDS``.
        backend: a name; the operator has replaced ``auto`` before.

    Raises:
        InputError: if the operator has no such back end.
    """
    known = BACKENDS[op]
    if backend not in known:
        raise InputError(
            f"backend {backend!r} is not available for {op}; choose auto or one of "
            f"{', '.join(known)}.{suggest(backend, known)}"
        )
    return backend


# What follows does not change in a graph that is captured, which takes it as a constant.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def compiles_triton(device: torch.device) -> bool:
    """Return whether ``auto`` may choose Triton: it is installed and compiles for the device."""
    if device.type != "cuda" or not torch.cuda.is_available() or torch.version.hip is not None:
        return False
    is_installed = importlib.util.find_spec("triton") is not None
    return is_installed and torch.cuda.get_device_capability(device) >= _LOWEST_CAPABILITY


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def compiles_native() -> bool:
    """Return whether ``auto`` may choose compiled kernels.

    Their check in this process passed, and no transform of ``torch.func`` is on. Imports Numba, so
    call only where a kernel would run next.
    """
    return not is_transformed() and explain_unusable() is None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def require_triton(device: torch.device) -> None:
    """Check that Triton's kernels, chosen by name, can run.

    Raises:
        InputError: if Triton is not installed, or the device is no GPU and its kernels are not
            interpreted (``TRITON_INTERPRET=1``, slow, for tests).
    """
    if importlib.util.find_spec("triton") is None:
        raise InputError("backend 'triton' needs Triton; pip install 'unimatrix-lm[gpu]'.")
    if device.type == "cuda":
        return
    from unimatrix.ops.triton import INTERPRETED

    if not INTERPRETED or device.type != "cpu":
        raise InputError(f"backend 'triton' runs on a CUDA device, not on {device}; choose auto.")
