"""Matrix state: an [N, N] state a head that retains, is written by rules, and is read (E1 to E4)."""

import contextlib

import torch
from torch import Tensor

from unimatrix.errors import InputError
from unimatrix.ops.backends import require_backend
from unimatrix.ops.matrix_state.parallel import scan_parallel
from unimatrix.ops.matrix_state.reference import scan_reference

__all__ = ["choose_backend", "scan_matrix_state"]

_NUM_RULES = 3


def choose_backend(num_tokens: int, device: torch.device, *, norm_guard: bool = False) -> str:
    """Return the back end that ``auto`` stands for.

    Up to 2 tokens the reference: a few tensor operations cost less than calling a kernel, and
    decoding needs no compiler. Beyond, on the CPU, the kernels; elsewhere the chunked form or,
    with the norm guard, which has none, the reference.

    Args:
        num_tokens: T.
        device: where the inputs are.
        norm_guard: whether S is divided by its norm.
    """
    if num_tokens == 1:
        return "reference"
    if device.type == "cpu":
        return "native"
    return "reference" if norm_guard else "parallel"


def _require_shape(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    if x.shape != shape:
        raise InputError(f"{name} has shape {tuple(x.shape)}; pass {shape}.")


def _require_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    d: Tensor | None,
    log_retention: Tensor,
    rule_weights: Tensor | None,
) -> None:
    """Raise InputError unless the token inputs fit together."""
    if q.dim() != 4 or q.shape[1] == 0 or not q.is_floating_point():
        raise InputError(
            f"q has shape {tuple(q.shape)} and dtype {q.dtype}; "
            "pass floating [B, T, H, N] with at least one token."
        )
    if (d is None) != (rule_weights is None):
        given, missing = ("d", "rule_weights") if rule_weights is None else ("rule_weights", "d")
        raise InputError(
            f"{given} is given but {missing} is None; pass both to mix rules, or none."
        )
    for name, x in (("k", k), ("v", v), ("d", d)):
        if x is not None:
            _require_shape(name, x, tuple(q.shape))
    _require_shape("log_retention", log_retention, tuple(q.shape[:3]))
    if rule_weights is not None:
        _require_shape("rule_weights", rule_weights, (*q.shape[:3], _NUM_RULES))


def _require_lengths(lengths: Tensor, num_rows: int, num_tokens: int) -> None:
    """Raise InputError unless lengths are [B] integers in 0..T (the range on the CPU only)."""
    _require_shape("lengths", lengths, (num_rows,))
    if lengths.dtype != torch.int64:
        raise InputError(f"lengths has dtype {lengths.dtype}; pass int64.")
    if lengths.device.type == "cpu" and num_rows > 0:
        shortest, longest = (int(x) for x in lengths.aminmax())
        if shortest < 0 or longest > num_tokens:
            raise InputError(
                f"lengths go from {shortest} to {longest}; pass values in 0..{num_tokens}."
            )


def _require_backend(backend: str, q: Tensor, norm_guard: bool) -> str:
    """Return the back end to run, or raise InputError if the one named cannot."""
    if backend == "auto":
        return choose_backend(q.shape[1], q.device, norm_guard=norm_guard)
    require_backend("matrix_state", backend)
    if backend == "parallel" and norm_guard:
        raise InputError(
            "backend 'parallel' has no norm_guard, which makes the recurrence nonlinear; "
            "choose reference or native."
        )
    if backend == "native" and q.device.type != "cpu":
        raise InputError(f"backend 'native' runs on the CPU, not on {q.device}; choose parallel.")
    return backend


def _clear_padding(x: Tensor | None, lengths: Tensor) -> Tensor | None:
    """Return [B, T, ...] with zeros at padded positions, whatever was there."""
    if x is None:
        return None
    padded = torch.arange(x.shape[1], device=x.device) >= lengths[:, None]  # [B, T]
    return x.masked_fill(padded.reshape(*padded.shape, *(1,) * (x.dim() - 2)), 0.0)


def _run_without_autocast(device_type: str) -> contextlib.AbstractContextManager[object]:
    """Return a context in which matrix products keep their inputs' dtype."""
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def scan_matrix_state(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    d: Tensor | None,
    log_retention: Tensor,
    rule_weights: Tensor | None,
    *,
    initial_state: Tensor | None = None,
    lengths: Tensor | None = None,
    norm_guard: bool = False,
    chunk_size: int = 64,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Write each token into the matrix state, then read it.

    Equation: E1 to E4, spelt out in ``reference.py``.

    Args:
        q: [B, T, H, N] any float; what is read.
        k: [B, T, H, N]; the payload.
        v: [B, T, H, N]; the address.
        d: [B, T, H, N]; what the diagonal rule writes. Given exactly if ``rule_weights`` is.
        log_retention: [B, T, H] natural log of retention, <= 0 (-inf: forget all).
        rule_weights: [B, T, H, 3] weights of the outer, diagonal and symmetric rule, summing to 1;
            None: the outer rule alone.
        initial_state: [B, H, N, N], payload by address; None: zeros.
        lengths: [B] int64 in 0..T, the leading real tokens of each row; None: all are real.
        norm_guard: divide S by its Frobenius norm wherever that exceeds 1.
        chunk_size: tokens of a chunk in the parallel form, >= 1.
        backend: ``auto`` (see ``choose_backend``), ``reference``, ``parallel`` or ``native``.

    Returns:
        y [B, T, H, N] in q's dtype, zero at padded positions; the state after each row's last real
        token [B, H, N, N] in float64 for float64 q, else in float32. Neither aliases an input.

    Raises:
        InputError: if shapes do not fit, only one of d and rule_weights is given, lengths leave
            0..T (checked on the CPU), or the back end cannot run this (norm guard, device).

    Cost: O(T N^2) time a head (parallel: O(T N (N + chunk_size))), in float32 at least, also under
        autocast. Memory linear in T, see each back end. Causal, and differentiable in all
        floating arguments; native once.
    """
    _require_inputs(q, k, v, d, log_retention, rule_weights)
    B, T, H, N = q.shape
    if lengths is not None:
        _require_lengths(lengths, B, T)
    if chunk_size < 1:
        raise InputError(f"chunk_size is {chunk_size}; pass at least 1.")
    chosen = _require_backend(backend, q, norm_guard)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if initial_state is None:
        initial_state = q.new_zeros((B, H, N, N), dtype=dtype)
    _require_shape("initial_state", initial_state, (B, H, N, N))
    leaves = (q, k, v, d, log_retention, rule_weights)
    inputs = [x if x is None else x.to(dtype) for x in leaves]
    initial_state = initial_state.to(dtype)
    if chosen == "native":
        from unimatrix.ops.matrix_state.native import scan_native  # loads the compiler

        y, final_state = scan_native(
            *inputs, initial_state=initial_state, lengths=lengths, norm_guard=norm_guard
        )
        return y.to(q.dtype), final_state
    if lengths is not None:
        inputs = [_clear_padding(x, lengths) for x in inputs]
    with _run_without_autocast(q.device.type):
        if chosen == "parallel":
            y, final_state = scan_parallel(
                *inputs, initial_state=initial_state, chunk_size=chunk_size
            )
        else:
            y, final_state = scan_reference(
                *inputs, initial_state=initial_state, lengths=lengths, norm_guard=norm_guard
            )
    return y.to(q.dtype), final_state
