"""Matrix state in Triton: the chunks of ``parallel.py``, fused, with their own backward.

Four kernels. Two go over the chunks of a (row, head) one after another and leave the [N, N] state
before each chunk or, from the end, its gradient after it. Two take all chunks at once. A program
has P columns of what it stores; where it needs all N, it loads P at a time.

With ρ retention, Λ its summed logarithm inside a chunk and E_ti = exp(Λ_t - Λ_i) for i <= t, a
token i writes a_i k v^T + b_i v k^T + c_i Diag(d); a, b, c carry 1 - ρ_i and the rule weights.
Nothing of size [T, N, N] exists: one state a chunk does.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from unimatrix.ops.matrix_state.reference import TokenInputs
from unimatrix.ops.matrix_state.triton_tiles import (
    apply_matrix,
    compare_tokens,
    load_columns,
    load_retention,
    load_rules,
    locate_tokens,
    retain_between,
    store_columns,
    weigh_rules,
)
from unimatrix.ops.operator import declare_operator

_SMALLEST_TILE, _LARGEST_CHUNK, _MOST_COLUMNS = 16, 32, 32


@triton.jit
def _carry_states(
    k, v, d, log_retention, rule_weights, lengths, initial, states, final, T, H, num_chunks,
    N: tl.constexpr, C: tl.constexpr, W: tl.constexpr, P: tl.constexpr,
    PRECISION: tl.constexpr, MIXED: tl.constexpr, HAS_LENGTHS: tl.constexpr,
):  # fmt: skip
    """Store the state before each chunk and after the last (E1, E2); P of its rows a program."""
    ACC: tl.constexpr = states.dtype.element_ty
    row = tl.program_id(0)
    payload, address = tl.program_id(1) * P + tl.arange(0, P), tl.arange(0, W)
    cell = payload[:, None] * N + address[None, :]
    inside = (payload < N)[:, None] & (address < N)[None, :]
    first = row.to(tl.int64) * N * N
    S = tl.load(initial + first + cell, mask=inside, other=0.0)
    for chunk in range(num_chunks):
        tl.store(states + (first * num_chunks + chunk * N * N) + cell, S, mask=inside)
        start, token, _, real = locate_tokens(lengths, row, chunk, T, H, C, HAS_LENGTHS)
        rho, _, _, to_end, chunk_rho = load_retention(log_retention, start, token, real, C, ACC)
        _, a, b, c = weigh_rules(rho, rule_weights, start, token, real, MIXED, ACC)
        k_p = load_columns(k, start, token, real, payload, N, ACC) * (a * to_end)[:, None]
        v_w = load_columns(v, start, token, real, address, N, ACC)
        S = tl.dot(tl.trans(k_p), v_w, S * chunk_rho, input_precision=PRECISION, out_dtype=ACC)
        if MIXED:
            v_p = load_columns(v, start, token, real, payload, N, ACC) * (b * to_end)[:, None]
            k_w = load_columns(k, start, token, real, address, N, ACC)
            S = tl.dot(tl.trans(v_p), k_w, S, input_precision=PRECISION, out_dtype=ACC)
            d_p = load_columns(d, start, token, real, payload, N, ACC) * (c * to_end)[:, None]
            corner = tl.sum(d_p, 0)  # [P]
            S += tl.where(payload[:, None] == address[None, :], corner[:, None], 0.0)
    tl.store(final + first + cell, S, mask=inside)


@triton.jit
def _read_states(
    q, k, v, d, log_retention, rule_weights, lengths, states, y, T, H, num_chunks,
    N: tl.constexpr, C: tl.constexpr, W: tl.constexpr, P: tl.constexpr,
    PRECISION: tl.constexpr, MIXED: tl.constexpr, HAS_LENGTHS: tl.constexpr,
):  # fmt: skip
    """Store P columns of a chunk's readouts (E4)."""
    ACC: tl.constexpr = states.dtype.element_ty
    row, chunk = tl.program_id(0), tl.program_id(1)
    column = tl.program_id(2) * P + tl.arange(0, P)
    start, token, exists, real = locate_tokens(lengths, row, chunk, T, H, C, HAS_LENGTHS)
    rho, high, low, _, _ = load_retention(log_retention, start, token, real, C, ACC)
    _, a, b, c = weigh_rules(rho, rule_weights, start, token, real, MIXED, ACC)
    E = retain_between(high, low, C)
    S = states + (row.to(tl.int64) * num_chunks + chunk) * N * N
    out = apply_matrix(q, S, column, True, start, token, real, N, C, W, P, PRECISION, ACC)
    x = compare_tokens(q, v, start, token, real, N, C, W, P, PRECISION, ACC) * E
    k_p = load_columns(k, start, token, real, column, N, ACC) * a[:, None]
    out = out * tl.exp(high)[:, None]
    out = tl.dot(x, k_p, out, input_precision=PRECISION, out_dtype=ACC)
    if MIXED:
        x = compare_tokens(q, k, start, token, real, N, C, W, P, PRECISION, ACC) * E
        v_p = load_columns(v, start, token, real, column, N, ACC) * b[:, None]
        out = tl.dot(x, v_p, out, input_precision=PRECISION, out_dtype=ACC)
        d_p = load_columns(d, start, token, real, column, N, ACC) * c[:, None]
        corner = tl.dot(E, d_p, input_precision=PRECISION, out_dtype=ACC)
        out += load_columns(q, start, token, real, column, N, ACC) * corner
    store_columns(y, out, start, token, exists, column, N)


@triton.jit
def _carry_gradients(
    q, dy, log_retention, lengths, dfinal, grads, dinitial, T, H, num_chunks,
    N: tl.constexpr, C: tl.constexpr, W: tl.constexpr, P: tl.constexpr,
    PRECISION: tl.constexpr, HAS_LENGTHS: tl.constexpr,
):  # fmt: skip
    """Store the gradient of the state after each chunk and before the first, from the end."""
    ACC: tl.constexpr = grads.dtype.element_ty
    row = tl.program_id(0)
    payload, address = tl.program_id(1) * P + tl.arange(0, P), tl.arange(0, W)
    cell = payload[:, None] * N + address[None, :]
    inside = (payload < N)[:, None] & (address < N)[None, :]
    first = row.to(tl.int64) * N * N
    G = tl.load(dfinal + first + cell, mask=inside, other=0.0)
    for num_after in range(num_chunks):
        chunk = num_chunks - 1 - num_after
        tl.store(grads + (first * num_chunks + chunk * N * N) + cell, G, mask=inside)
        start, token, _, real = locate_tokens(lengths, row, chunk, T, H, C, HAS_LENGTHS)
        _, high, _, _, chunk_rho = load_retention(log_retention, start, token, real, C, ACC)
        dy_p = load_columns(dy, start, token, real, payload, N, ACC) * tl.exp(high)[:, None]
        q_w = load_columns(q, start, token, real, address, N, ACC)
        G = tl.dot(tl.trans(dy_p), q_w, G * chunk_rho, input_precision=PRECISION, out_dtype=ACC)
    tl.store(dinitial + first + cell, G, mask=inside)


@triton.jit
def _sum_pairs(
    q, k, v, d, dy, E, a, b, c, start, token, real,
    N: tl.constexpr, C: tl.constexpr, W: tl.constexpr, P: tl.constexpr,
    PRECISION: tl.constexpr, MIXED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Return for each t what is written before t and read at t or later in the chunk [C]."""
    x = compare_tokens(q, v, start, token, real, N, C, W, P, PRECISION, ACC)
    pairs = x * compare_tokens(dy, k, start, token, real, N, C, W, P, PRECISION, ACC) * a[None, :]
    if MIXED:
        x = compare_tokens(q, k, start, token, real, N, C, W, P, PRECISION, ACC)
        x *= compare_tokens(dy, v, start, token, real, N, C, W, P, PRECISION, ACC)
        pairs += x * b[None, :]
        x = tl.zeros([C, C], dtype=ACC)
        for first in range(0, W, P):
            rows = first + tl.arange(0, P)
            both = load_columns(q, start, token, real, rows, N, ACC)
            both *= load_columns(dy, start, token, real, rows, N, ACC)
            d_w = tl.trans(load_columns(d, start, token, real, rows, N, ACC))
            x = tl.dot(both, d_w, x, input_precision=PRECISION, out_dtype=ACC)
        pairs += x * c[None, :]
    order = tl.arange(0, C)
    later = tl.cumsum(pairs * E, 0, reverse=True)
    return tl.sum(tl.where(order[:, None] > order[None, :], later, 0.0), 1)


@triton.jit
def _write_gradients(
    q, k, v, d, log_retention, rule_weights, lengths, states, grads, dy,
    dq, dk, dv, dd, dlog_retention, drule_weights, T, H, num_chunks, num_tokens,
    N: tl.constexpr, C: tl.constexpr, W: tl.constexpr, P: tl.constexpr,
    PRECISION: tl.constexpr, MIXED: tl.constexpr, HAS_LENGTHS: tl.constexpr,
):  # fmt: skip
    """Store the gradients of a chunk's tokens: P columns, and what these add to the scalars'.

    The gradient of log retention at t is a sum over all that is written before t and read at t or
    later. It is formed as such, without differences: what is forgotten has gradient 0.
    """
    ACC: tl.constexpr = grads.dtype.element_ty
    row, chunk, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    column, order = part * P + tl.arange(0, P), tl.arange(0, C)
    start, token, exists, real = locate_tokens(lengths, row, chunk, T, H, C, HAS_LENGTHS)
    rho, high, low, to_end, chunk_rho = load_retention(log_retention, start, token, real, C, ACC)
    write, a, b, c = weigh_rules(rho, rule_weights, start, token, real, MIXED, ACC)
    E = retain_between(high, low, C)
    S = states + (row.to(tl.int64) * num_chunks + chunk) * N * N
    G = grads + (row.to(tl.int64) * num_chunks + chunk) * N * N

    # dq, by what was written in the chunk and before it.
    q_p = load_columns(q, start, token, real, column, N, ACC)
    dq_p = apply_matrix(dy, S, column, False, start, token, real, N, C, W, P, PRECISION, ACC)
    dq_p *= tl.exp(high)[:, None]
    read_before = tl.sum(dq_p * q_p, 1)
    y_k = compare_tokens(dy, k, start, token, real, N, C, W, P, PRECISION, ACC) * E
    v_p = load_columns(v, start, token, real, column, N, ACC)
    dq_p = tl.dot(y_k * a[None, :], v_p, dq_p, input_precision=PRECISION, out_dtype=ACC)
    if MIXED:
        y_v = compare_tokens(dy, v, start, token, real, N, C, W, P, PRECISION, ACC) * E
        k_p = load_columns(k, start, token, real, column, N, ACC) * b[:, None]
        dq_p = tl.dot(y_v, k_p, dq_p, input_precision=PRECISION, out_dtype=ACC)
        d_p = load_columns(d, start, token, real, column, N, ACC) * c[:, None]
        dy_p = load_columns(dy, start, token, real, column, N, ACC)
        dq_p += dy_p * tl.dot(E, d_p, input_precision=PRECISION, out_dtype=ACC)
    store_columns(dq, dq_p, start, token, exists, column, N)

    # dv, by what is read after the chunk and in it; likewise dk and dd below.
    to_v = apply_matrix(k, G, column, False, start, token, real, N, C, W, P, PRECISION, ACC)
    to_v = tl.dot(
        tl.trans(y_k), q_p, to_v * to_end[:, None], input_precision=PRECISION, out_dtype=ACC
    )
    dv_p = to_v * a[:, None]
    if MIXED:
        dy_p = load_columns(dy, start, token, real, column, N, ACC)
        x_k = compare_tokens(q, k, start, token, real, N, C, W, P, PRECISION, ACC) * E
        to_v = apply_matrix(k, G, column, True, start, token, real, N, C, W, P, PRECISION, ACC)
        to_v = tl.dot(
            tl.trans(x_k), dy_p, to_v * to_end[:, None], input_precision=PRECISION, out_dtype=ACC
        )
        dv_p += to_v * b[:, None]
    store_columns(dv, dv_p, start, token, exists, column, N)

    k_p = load_columns(k, start, token, real, column, N, ACC)
    dy_p = load_columns(dy, start, token, real, column, N, ACC)
    x_v = compare_tokens(q, v, start, token, real, N, C, W, P, PRECISION, ACC) * E
    to_k = apply_matrix(v, G, column, True, start, token, real, N, C, W, P, PRECISION, ACC)
    to_k *= to_end[:, None]
    read_after = a * tl.sum(k_p * to_k, 1)
    to_k = tl.dot(tl.trans(x_v), dy_p, to_k, input_precision=PRECISION, out_dtype=ACC)
    dk_p, by_outer = to_k * a[:, None], tl.sum(k_p * to_k, 1)
    by_write = by_outer
    if MIXED:
        to_k = apply_matrix(v, G, column, False, start, token, real, N, C, W, P, PRECISION, ACC)
        to_k *= to_end[:, None]
        read_after += b * tl.sum(k_p * to_k, 1)
        y_v = compare_tokens(dy, v, start, token, real, N, C, W, P, PRECISION, ACC) * E
        to_k = tl.dot(tl.trans(y_v), q_p, to_k, input_precision=PRECISION, out_dtype=ACC)
        dk_p += to_k * b[:, None]
        by_symmetric = (by_outer + tl.sum(k_p * to_k, 1)) * 0.5
        d_p = load_columns(d, start, token, real, column, N, ACC)
        on_diagonal = tl.load(G + column * (N + 1), mask=column < N, other=0.0)
        to_d = on_diagonal[None, :] * to_end[:, None]
        read_after += c * tl.sum(d_p * to_d, 1)
        to_d = tl.dot(tl.trans(E), dy_p * q_p, to_d, input_precision=PRECISION, out_dtype=ACC)
        store_columns(dd, to_d * c[:, None], start, token, exists, column, N)
        by_diagonal = tl.sum(d_p * to_d, 1)
        outer, diagonal, symmetric = load_rules(rule_weights, start, token, real, ACC)
        by_write = outer * by_outer + diagonal * by_diagonal + symmetric * by_symmetric
        at = drule_weights + (part * num_tokens + start + token) * 3
        tl.store(at, write * by_outer, mask=exists)
        tl.store(at + 1, write * by_diagonal, mask=exists)
        tl.store(at + 2, write * by_symmetric, mask=exists)
    store_columns(dk, dk_p, start, token, exists, column, N)

    # Written before t, in the chunk or before it, and read at t or later, in it or after it.
    retained = tl.sum(tl.where(order[:, None] > order[None, :], read_after[None, :], 0.0), 1)
    retained += tl.cumsum(read_before, 0, reverse=True)
    for first in range(0, W, P):
        rows = first + tl.arange(0, P)
        inside = (rows < N)[:, None] & (column < N)[None, :]
        cell = rows[:, None] * N + column[None, :]
        both = tl.load(S + cell, mask=inside, other=0.0) * tl.load(G + cell, mask=inside, other=0.0)
        retained += chunk_rho * tl.sum(tl.sum(both, 1), 0)
    if part == 0:
        retained += _sum_pairs(
            q, k, v, d, dy, E, a, b, c, start, token, real, N, C, W, P, PRECISION, MIXED, ACC
        )
    dlog = tl.where(real, retained - rho.to(ACC) * by_write, 0.0)
    tl.store(dlog_retention + part * num_tokens + start + token, dlog, mask=exists)


def _choose_chunk(chunk_size: int) -> int:
    """Return the tokens of a chunk."""
    return min(_LARGEST_CHUNK, max(_SMALLEST_TILE, 1 << (chunk_size - 1).bit_length()))


def _choose_tiles(N: int, chunk_size: int, *, narrow: bool) -> dict[str, Any]:
    """Return N, the tokens of a chunk, the padded N, a program's columns and the precision.

    Args:
        N: rows of a matrix state.
        chunk_size: tokens of a chunk, before it is rounded.
        narrow: all vectors of a token have 16 bits.
    """
    width = max(_SMALLEST_TILE, triton.next_power_of_2(N))
    # As in any float32 product on a GPU: what torch was told, float32 unless it was told otherwise.
    # Vectors of 16 bits lose nothing in TF32, and the state, stored in float32, is read and written
    # with as many digits as they have, or more.
    exact = not narrow and torch.get_float32_matmul_precision() == "highest"
    return {
        "N": N,
        "C": _choose_chunk(chunk_size),
        "W": width,
        "P": min(width, _MOST_COLUMNS),
        "PRECISION": "tf32x3" if exact else "tf32",
    }


# One warp for each 16 tokens, the rows of a tensor core, in what takes a chunk at once.
_AT_ONCE = {"num_warps": 2, "num_stages": 1}


def _in_turn(width: int) -> dict[str, int]:
    """Return the options of what goes over the chunks, and has P rows of S of that width."""
    return {"num_warps": max(2, width // 16), "num_stages": 2}


def _are_narrow(*vectors: Tensor | None) -> bool:
    """Return whether all vectors have 16 bits."""
    return all(x.element_size() == 2 for x in vectors if x is not None)


def _count_chunks(num_tokens: int, chunk_size: int) -> int:
    return -(-num_tokens // _choose_chunk(chunk_size))


def _lay_out(*tensors: Tensor | None) -> list[Any]:
    """Return tensors as the kernels read them, one number after the other."""
    return [None if x is None else x.contiguous() for x in tensors]


def _run_forward(
    q: Tensor, k: Tensor, v: Tensor, d: Tensor | None, log_retention: Tensor,
    rule_weights: Tensor | None, lengths: Tensor | None, initial: Tensor, chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return y and the final state as ``scan_triton`` does, and the state before every chunk."""
    B, T, H, N = q.shape
    tiles = _choose_tiles(N, chunk_size, narrow=_are_narrow(q, k, v, d))
    parts, num_chunks = triton.cdiv(N, tiles["P"]), _count_chunks(T, chunk_size)
    forms = {"MIXED": d is not None, "HAS_LENGTHS": lengths is not None}
    states = initial.new_empty(B, H, num_chunks, N, N)
    final, y = initial.new_empty(initial.shape), q.new_empty(q.shape)
    q, *tokens = _lay_out(q, k, v, d, log_retention, rule_weights, lengths)
    sizes = (T, H, num_chunks)
    with torch.cuda.device_of(q):
        _carry_states[B * H, parts](
            *tokens, initial.contiguous(), states, final, *sizes, **forms, **tiles,
            **_in_turn(tiles["W"]),
        )  # fmt: skip
        _read_states[B * H, num_chunks, parts](
            q, *tokens, states, y, *sizes, **forms, **tiles, **_AT_ONCE
        )
    return y, final, states


def _run_backward(
    q: Tensor, k: Tensor, v: Tensor, d: Tensor | None, log_retention: Tensor,
    rule_weights: Tensor | None, lengths: Tensor | None, states: Tensor, chunk_size: int,
    dy: Tensor, dfinal: Tensor,
) -> list[Tensor]:  # fmt: skip
    """Return the gradients, empty ones for what is ``None``."""
    (B, T, H, N), num_chunks = q.shape, states.shape[2]
    tiles = _choose_tiles(N, chunk_size, narrow=_are_narrow(q, k, v, d))
    parts, sizes = triton.cdiv(N, tiles["P"]), (T, H, num_chunks)
    forms = {"MIXED": d is not None, "HAS_LENGTHS": lengths is not None}
    q, k, v, d, log_retention, *rest = _lay_out(q, k, v, d, log_retention, rule_weights, lengths)
    dy, dfinal = dy.contiguous(), dfinal.contiguous()
    after, dinitial = torch.empty_like(states), torch.empty_like(dfinal)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    dlog, dd, drules = states.new_empty(parts, B, T, H), None, None
    if d is not None:
        dd, drules = torch.empty_like(d), states.new_empty(parts, B, T, H, 3)
    with torch.cuda.device_of(q):
        _carry_gradients[B * H, parts](
            q, dy, log_retention, lengths, dfinal, after, dinitial, *sizes,
            HAS_LENGTHS=lengths is not None, **tiles, **_in_turn(tiles["W"]),
        )  # fmt: skip
        _write_gradients[B * H, num_chunks, parts](
            q, k, v, d, log_retention, *rest, states, after, dy,
            dq, dk, dv, dd, dlog, drules, *sizes, B * T * H, **forms, **tiles, **_AT_ONCE,
        )  # fmt: skip
    dlog = dlog.sum(0).to(log_retention.dtype)
    if dd is None or drules is None or rule_weights is None:
        return [dq, dk, dv, q.new_empty(0), dlog, q.new_empty(0), dinitial]
    return [dq, dk, dv, dd, dlog, drules.sum(0).to(rule_weights.dtype), dinitial]


_scan_chunks = declare_operator(
    "scan_chunks",
    _run_forward,
    backward=_run_backward,
    results="y final",
    saved="states",
    gradients="q k v d log_retention rule_weights initial",
    shapes=lambda q, k, v, d, log_retention, rule_weights, lengths, initial, chunk_size: (
        q.new_empty(q.shape),
        initial.new_empty(initial.shape),
        initial.new_empty(
            *initial.shape[:2], _count_chunks(q.shape[1], chunk_size), *initial.shape[2:]
        ),
    ),
    gradient_shapes=lambda q, k, v, d, log_retention, rule_weights, *others: [
        q.new_empty(0) if x is None else x.new_empty(x.shape)
        for x in (q, k, v, d, log_retention, rule_weights, others[-1])
    ],
    devices=None,
)


def scan_triton(
    tokens: TokenInputs, *, initial_state: Tensor, lengths: Tensor | None, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """Compute E1, E2 and E4 in fused chunks on a GPU; arguments as in ``scan_matrix_state``.

    The tokens are read in the dtypes they have; sums, and the state, are in that of
    ``initial_state``. A chunk is ``chunk_size`` tokens, rounded up to a power of two within 16..32.
    Products follow ``torch.set_float32_matmul_precision``; where all vectors have 16 bits they are
    TF32, those with the float32 state included.

    Cost: O(T N (N + C)) time a head for C tokens a chunk; T / C states of scratch, which the
        backward pass keeps, and as many again for their gradients while it runs.
    """
    y, final_state = _scan_chunks(*tokens[:-1], lengths, initial_state, chunk_size)
    return y, final_state
