"""The matrix-state operator: checks what comes in, chooses a back end."""

import contextlib

import torch
from torch import Tensor

from unimatrix.errors import InputError
from unimatrix.ops.backends import compiles_native, compiles_triton, require_backend, require_triton
from unimatrix.ops.checks import (
    find_real_tokens,
    is_autocast,
    require_dtype,
    require_lengths,
    require_shape,
)
from unimatrix.ops.matrix_state.delta_parallel import scan_delta_parallel
from unimatrix.ops.matrix_state.parallel import scan_parallel
from unimatrix.ops.matrix_state.reference import TokenInputs, scan_reference

LARGEST_TRITON_N = 128
_scan_reference_apart = torch.compiler.disable(scan_reference)  # type: ignore[no-untyped-call]
"""The loop outside a graph, which would hold the operations of every token."""
_LETTERS = {"log_retention": "B T H", "rule_weights": "B T H R", "write_strength": "B T H"}


def choose_backend(
    num_tokens: int,
    device: torch.device,
    *,
    norm_guard: bool = False,
    is_delta: bool = False,
    head_dim: int = 1,
    is_double: bool = False,
) -> str:
    """Return the back end that ``auto`` stands for.

    One token: the reference, since a few tensor operations cost about as much as calling a kernel
    and decoding then needs no compiler. More, on the CPU: the kernels, which in training were
    several times faster than the chunked form at N = 16 and 32 and about as fast at N = 128. More,
    elsewhere or where kernels do not run here: with the norm guard, the reference; else Triton's
    kernels where they compile and have the form, the chunked form where not. On a GPU none of them
    has been timed. In a graph that ``torch.compile`` captures on the CPU: the chunked form; what
    needs the norm guard breaks it in two.
    """
    if num_tokens == 1:
        return "reference"
    is_wanted = device.type == "cpu" and (norm_guard or not torch.compiler.is_compiling())
    if is_wanted and compiles_native():
        return "native"
    if norm_guard:
        return "reference"
    has_kernel = not is_delta and head_dim <= LARGEST_TRITON_N and not is_double
    return "triton" if has_kernel and compiles_triton(device) else "parallel"


def _require_tokens(tokens: TokenInputs) -> dict[str, int]:
    """Return the sizes by letter, or raise InputError if the inputs do not fit together."""
    d, rule_weights = tokens.d, tokens.rule_weights
    if (d is None) != (rule_weights is None):
        names = ("d", "rule_weights") if rule_weights is None else ("rule_weights", "d")
        raise InputError(f"{names[0]} is given but {names[1]} is None; pass both, or none of them.")
    if tokens.write_strength is not None and rule_weights is not None:
        raise InputError(
            "write_strength and rule_weights are given; pass one: the delta rule is not mixed."
        )
    sizes: dict[str, int] = {}
    for name, x in zip(tokens._fields, tokens, strict=True):
        if x is not None:
            require_dtype(name, x, None)
            require_shape(name, x, _LETTERS.get(name, "B T H N"), sizes)
    if rule_weights is not None and rule_weights.shape[3] != 3:
        raise InputError(
            f"rule_weights hold {rule_weights.shape[3]} rules; pass outer, diagonal and symmetric."
        )
    return sizes


def _require_lengths(lengths: Tensor, sizes: dict[str, int]) -> None:
    """Raise InputError unless lengths are [B] int64 in 0..T (the range on the CPU only)."""
    require_dtype("lengths", lengths, torch.int64)
    require_shape("lengths", lengths, "B", sizes)
    require_lengths(lengths, sizes["T"])


def _require_backend(backend: str, tokens: TokenInputs, norm_guard: bool) -> str:
    """Return the back end to run, or raise InputError if the one named cannot."""
    (_, num_tokens, _, head_dim), device = tokens.q.shape, tokens.q.device
    is_delta = tokens.write_strength is not None
    if backend == "auto":
        is_double = tokens.q.dtype == torch.float64
        return choose_backend(
            num_tokens,
            device,
            norm_guard=norm_guard,
            is_delta=is_delta,
            head_dim=head_dim,
            is_double=is_double,
        )
    require_backend("matrix_state", backend)
    if backend in ("parallel", "triton") and norm_guard:
        raise InputError(
            f"backend {backend!r} has no norm_guard, which makes the recurrence nonlinear; "
            "choose reference or native."
        )
    if backend == "native" and device.type != "cpu":
        raise InputError(f"backend 'native' runs on the CPU, not on {device}; choose parallel.")
    if backend == "triton":
        if is_delta:
            raise InputError("backend 'triton' has no delta rule; choose parallel.")
        if head_dim > LARGEST_TRITON_N:
            raise InputError(
                f"backend 'triton' is for N up to {LARGEST_TRITON_N}, not {head_dim}; choose "
                "parallel."
            )
        require_triton(device)
    return backend


def _clear_padding(tokens: TokenInputs, lengths: Tensor) -> TokenInputs:
    """Return the inputs with zeros at padded positions, whatever was there."""
    padded = ~find_real_tokens(lengths, tokens.log_retention[:, :, 0])  # [B, T]
    return tokens.replace_each(
        lambda x: x.masked_fill(padded.view(*padded.shape, *[1] * (x.dim() - 2)), 0.0)
    )


def _run_without_autocast(device_type: str) -> contextlib.AbstractContextManager[object]:
    """Return a context in which matrix products keep their inputs' dtype."""
    if is_autocast(device_type):
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
    write_strength: Tensor | None = None,
    initial_state: Tensor | None = None,
    lengths: Tensor | None = None,
    norm_guard: bool = False,
    chunk_size: int = 64,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Write each token into the matrix state, then read it.

    Equation: E1 to E4 and E18, spelt out in ``reference.py``.

    Args:
        q: [B, T, H, N] any float; what is read.
        k: [B, T, H, N]; the payload.
        v: [B, T, H, N]; the address.
        d: [B, T, H, N]; what the diagonal rule writes. Given exactly if ``rule_weights`` is.
        log_retention: [B, T, H] natural log of retention, <= 0 (-inf: forget all).
        rule_weights: [B, T, H, 3] weights of the outer, diagonal and symmetric rule, summing to 1;
            None: the outer rule alone.
        write_strength: [B, T, H] in 0..1, the delta rule instead of the others (E18): so much of
            what the address held is replaced. Needs |v| <= 1, or the state may grow without bound.
        initial_state: [B, H, N, N], payload by address; None: zeros.
        lengths: [B] int64 in 0..T, the leading real tokens of each row; None: all are real.
        norm_guard: divide S by its Frobenius norm wherever that exceeds 1.
        chunk_size: tokens of a chunk in the parallel form, >= 1; Triton's has 16 or 32.
        backend: ``auto`` (see ``choose_backend``), ``reference``, ``parallel``, ``native`` or
            ``triton`` (a GPU; no norm guard, no delta rule, N up to 128).

    Returns:
        y [B, T, H, N] in q's dtype, zero at padded positions; the state after each row's last real
        token [B, H, N, N] in float64 for float64 q, else in float32. Neither aliases an input.

    Raises:
        InputError: if shapes do not fit, only one of d and rule_weights is given, rules or the norm
            guard come with write_strength, lengths leave 0..T (checked on the CPU), or the back end
            cannot run this (norm guard, delta rule, N, device, Triton not installed).

    Cost: O(T N^2) time a head (parallel: O(T N (N + chunk_size))), in float32 at least, also under
        autocast. Memory linear in T, see each back end. Causal, and differentiable in all
        floating arguments; native once.
    """
    tokens = TokenInputs(q, k, v, d, log_retention, rule_weights, write_strength)
    sizes = _require_tokens(tokens)
    if lengths is not None:
        _require_lengths(lengths, sizes)
    if norm_guard and write_strength is not None:
        raise InputError("norm_guard is for the other rules; leave it out with write_strength.")
    if chunk_size < 1:
        raise InputError(f"chunk_size is {chunk_size}; pass at least 1.")
    chosen = _require_backend(backend, tokens, norm_guard)
    initial_state = _start(q, initial_state, sizes)
    if chosen == "triton":
        from unimatrix.ops.matrix_state.triton import scan_triton

        return scan_triton(
            tokens, initial_state=initial_state, lengths=lengths, chunk_size=chunk_size
        )
    tokens = tokens.replace_each(lambda x: x.to(initial_state.dtype))
    if chosen == "native":
        y, final_state = _scan_native(tokens, initial_state, lengths, norm_guard)
    elif chosen == "parallel":
        y, final_state = _scan_parallel(tokens, initial_state, lengths, chunk_size)
    else:
        y, final_state = _scan_reference(tokens, initial_state, lengths, norm_guard)
    return y.to(q.dtype), final_state


def _start(q: Tensor, initial_state: Tensor | None, sizes: dict[str, int]) -> Tensor:
    """Return the state before the first token, in float32 at least; raise if it does not fit."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if initial_state is None:
        initial_state = q.new_zeros((sizes["B"], sizes["H"], sizes["N"], sizes["N"]), dtype=dtype)
    require_shape("initial_state", initial_state, "B H N N", sizes)
    return initial_state.to(dtype)


def _scan_parallel(
    tokens: TokenInputs, initial_state: Tensor, lengths: Tensor | None, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """Run the chunked form of the tokens' rule."""
    scan = scan_parallel if tokens.write_strength is None else scan_delta_parallel
    tokens = tokens if lengths is None else _clear_padding(tokens, lengths)
    with _run_without_autocast(tokens.q.device.type):
        return scan(tokens, initial_state=initial_state, chunk_size=chunk_size)


def _scan_reference(
    tokens: TokenInputs, initial_state: Tensor, lengths: Tensor | None, norm_guard: bool
) -> tuple[Tensor, Tensor]:
    """Run the loop over tokens."""
    loop = scan_reference if tokens.q.shape[1] == 1 else _scan_reference_apart
    tokens = tokens if lengths is None else _clear_padding(tokens, lengths)
    with _run_without_autocast(tokens.q.device.type):
        return loop(tokens, initial_state=initial_state, lengths=lengths, norm_guard=norm_guard)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _scan_native(
    tokens: TokenInputs, initial_state: Tensor, lengths: Tensor | None, norm_guard: bool
) -> tuple[Tensor, Tensor]:
    """Run the compiled scan of the tokens' rule."""
    # Imported here: it loads the compiler.
    if tokens.write_strength is not None:
        from unimatrix.ops.matrix_state.delta_native import scan_delta_native

        return scan_delta_native(tokens, initial_state=initial_state, lengths=lengths)
    from unimatrix.ops.matrix_state.native import scan_native

    return scan_native(tokens, initial_state=initial_state, lengths=lengths, norm_guard=norm_guard)
