"""Which back ends each operator has, and what an unusable request says.

``auto`` chooses; any other name runs or raises. Tests take their (operator, back end) pairs from
this table, so a back end added here is compared with its reference the same day.
"""

from unimatrix.errors import InputError, suggest

BACKENDS: dict[str, tuple[str, ...]] = {
    "matrix_state": ("reference", "parallel", "native"),
    "slots": ("reference", "parallel", "native"),
    "selective_slots": ("reference", "native"),
    "dense_memory": ("reference", "parallel"),
    "suffix_automaton": ("reference", "native"),
    "fused_passes": ("reference", "native"),
}


def require_backend(op: str, backend: str) -> str:
    """Return ``backend`` if ``op`` has it.

    Args:
        op: a key of ``BACKENDS``.
        backend: the name asked for; ``auto`` must be resolved by the operator before.

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
