"""Matrix state in Numba: a fused scan over the tokens of each (row, head), with its own backward.

A row of a head's matrix is one value in vector registers (``ops.numba.lanes``).

The forward scan keeps S transposed, ``[address, payload]``: the readout S q is then a sum of rows.
The backward keeps ``[payload, address]`` instead, which makes S^T dy a sum of rows. Writing and
reading a token is the same code in both, with k and v (and q and dy) exchanged.

The forward saves one state per few tokens and the backward recomputes the ones in between.
"""
# mypy: allow-untyped-defs

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from unimatrix.ops.matrix_state.reference import TokenInputs
from unimatrix.ops.numba.compile import kernel, part
from unimatrix.ops.numba.lanes import (
    OPTIONS,
    load,
    plus,
    plus_at,
    pointer,
    store,
    times,
    total,
    zeros,
)
from unimatrix.ops.numba.threads import run_rows
from unimatrix.ops.operator import declare_operator


class _ScanForm(NamedTuple):
    """Options of the kernels as tuples, since Numba compiles a kernel for their lengths."""

    width: tuple[int, ...]  # N zeros
    mixed: tuple[int, ...]  # empty: the outer rule alone
    norm_guard: tuple[int, ...]  # empty: no norm guard


@part(**OPTIONS)
def weigh_rules(form, write, pi):
    """Return the factors of k v^T, v k^T and Diag(d) in (1 - rho) U."""
    outer, swapped, diagonal = 1.0, 0.0, 0.0
    if len(form.mixed):
        swapped, diagonal = pi[2] / 2, float(pi[1])
        outer = pi[0] + swapped
    return write * outer, write * swapped, write * diagonal


@part(**OPTIONS)
def make_identity(N, like):
    """Return the rows of an identity matrix: a multiple of row i adds to lane i alone."""
    identity = np.empty(N * N, like.dtype)
    for i in range(N * N):
        identity[i] = 1 if i % (N + 1) == 0 else 0
    return identity


@part(**OPTIONS)
def write_and_read(
    form, identity, source, target, retention, factors, rows, columns, d, reader, out
):  # fmt: skip
    """Write a token (E1, E2), divide by the norm (E3), read it (E4); return the norm."""
    N, width = len(form.width), form.width
    outer, swapped, diagonal = factors
    written = times(load(columns, 0, width), outer)
    other = times(load(rows, 0, width), swapped)
    corner = times(load(d, 0, width), diagonal)
    result, squares = zeros(source, width), zeros(source, width)
    for i in range(N):
        row = times(load(source, i * N, width), retention)
        row = plus(row, times(written, rows[i]))
        if len(form.mixed):
            row = plus(row, times(other, columns[i]))
            row = plus(row, times(load(identity, i * N, width), corner))
        if len(form.norm_guard):
            squares = plus(squares, times(row, row))
        store(target, i * N, row)
        result = plus(result, times(row, reader[i]))
    norm = math.sqrt(total(squares))
    if norm > 1:
        scale = 1 / norm
        result = times(result, scale)
        for i in range(N):
            store(target, i * N, times(load(target, i * N, width), scale))
    store(out, 0, result)
    return norm


@part(**OPTIONS)
def _read_gradient(form, G, after, norm, q, dy):
    """Add dy q^T to G, then turn it into the gradient before the division by the norm."""
    N, width = len(form.width), form.width
    query, products = load(q, 0, width), zeros(G, width)
    for i in range(N):
        row = plus(load(G, i * N, width), times(query, dy[i]))
        store(G, i * N, row)
        products = plus(products, times(row, load(after, i * N, width)))
    if norm > 1:
        scale = 1 / norm
        component = -total(products)  # along the state, which the norm takes off
        for i in range(N):
            row = plus(load(G, i * N, width), times(load(after, i * N, width), component))
            store(G, i * N, times(row, scale))


@part(**OPTIONS)
def write_gradient(
    form, identity, G, transposed, before, retention, factors, q, k, v, d, dy, dk, dv, dd
):  # fmt: skip
    """Set dk, dv, dd; carry G over the token; return d loss / d (retention, factors).

    ``transposed`` is G transposed, so that G v and G k are sums of rows, as v G and k G are, not
    sums within registers. With a norm guard it is not used.
    """
    N, width = len(form.width), form.width
    outer, swapped, diagonal = factors
    query, payload, address = load(q, 0, width), load(k, 0, width), load(v, 0, width)
    by_retention, Gv, Gk = zeros(G, width), zeros(G, width), zeros(G, width)
    vG, kG, corner = zeros(G, width), zeros(G, width), zeros(G, width)
    for i in range(N):
        row = load(G, i * N, width)
        if not len(form.norm_guard):
            row = plus(row, times(query, dy[i]))
        by_retention = plus(by_retention, times(row, load(before, i * N, width)))
        kG = plus(kG, times(row, k[i]))
        if len(form.norm_guard):
            Gv = plus_at(Gv, i, total(times(row, address)))
        if len(form.mixed):
            vG = plus(vG, times(row, v[i]))
            corner = plus(corner, times(load(identity, i * N, width), row))
            if len(form.norm_guard):
                Gk = plus_at(Gk, i, total(times(row, payload)))
        store(G, i * N, times(row, retention))
    if not len(form.norm_guard):
        readout_grad = load(dy, 0, width)
        for j in range(N):
            column = plus(load(transposed, j * N, width), times(readout_grad, q[j]))
            Gv = plus(Gv, times(column, v[j]))
            if len(form.mixed):
                Gk = plus(Gk, times(column, k[j]))
            store(transposed, j * N, times(column, retention))
    store(dk, 0, plus(times(Gv, outer), times(vG, swapped)))
    store(dv, 0, plus(times(kG, outer), times(Gk, swapped)))
    if len(form.mixed):
        store(dd, 0, times(corner, diagonal))
    by_diagonal = total(times(corner, load(d, 0, width)))
    by_outer, by_swapped = total(times(kG, address)), total(times(vG, payload))
    return total(by_retention), by_outer, by_swapped, by_diagonal


@kernel(**OPTIONS)
def _scan_rows(
    first, last, form, q, k, v, d, retention, write, rule_weights, initial, lengths,
    num_tokens, num_heads, interval, y, final, checkpoints,
):  # fmt: skip
    N = len(form.width)
    identity = make_identity(N, final)
    S = np.empty(N * N, final.dtype)  # [address, payload]
    num_checkpoints = checkpoints.size // (lengths.size * num_heads * N * N)
    for row in range(first, last):
        b, h = row // num_heads, row % num_heads
        for i in range(N):
            for j in range(N):
                S[j * N + i] = initial[(row * N + i) * N + j]
        for t in range(lengths[b]):
            if interval > 0 and t % interval == 0:
                saved = (row * num_checkpoints + t // interval) * N * N
                for i in range(N):
                    for j in range(N):
                        checkpoints[saved + i * N + j] = S[j * N + i]
            token = (b * num_tokens + t) * num_heads + h
            at = token * N
            write_and_read(
                form, pointer(identity, 0), pointer(S, 0), pointer(S, 0), retention[token],
                weigh_rules(form, write[token], pointer(rule_weights, 3 * token)),
                pointer(v, at), pointer(k, at), pointer(d, at),
                pointer(q, at), pointer(y, at),
            )  # fmt: skip
        for i in range(N):
            for j in range(N):
                final[(row * N + i) * N + j] = S[j * N + i]


@kernel(**OPTIONS)
def _backward_rows(
    first, last, form, q, k, v, d, retention, write, rule_weights, lengths,
    num_tokens, num_heads, interval, checkpoints, dy, dfinal,
    dq, dk, dv, dd, dlog_retention, drule_weights, dinitial,
):  # fmt: skip
    N = len(form.width)
    size = N * N
    G = np.empty(size, dq.dtype)  # gradient of S at the current token, [payload, address]
    transposed, identity = np.empty(size, dq.dtype), make_identity(N, dq)
    S = np.empty((interval + 1) * size, dq.dtype)  # the states around a few tokens
    norms = np.empty(interval, dq.dtype)
    num_checkpoints = checkpoints.size // (lengths.size * num_heads * size)
    for row in range(first, last):
        b, h = row // num_heads, row % num_heads
        for n in range(size):
            G[n] = dfinal[row * size + n]
            transposed[n % N * N + n // N] = G[n]
        for chunk in range((lengths[b] - 1) // interval, -1, -1):
            start, stop = chunk * interval, min((chunk + 1) * interval, lengths[b])
            for n in range(size):
                S[n] = checkpoints[(row * num_checkpoints + chunk) * size + n]
            for t in range(start, stop):
                token = (b * num_tokens + t) * num_heads + h
                at, now = token * N, (t - start) * size
                norms[t - start] = write_and_read(
                    form, pointer(identity, 0), pointer(S, now), pointer(S, now + size),
                    retention[token],
                    weigh_rules(form, write[token], pointer(rule_weights, 3 * token)),
                    pointer(k, at), pointer(v, at), pointer(d, at),
                    pointer(dy, at), pointer(dq, at),
                )  # fmt: skip
            for t in range(stop - 1, start - 1, -1):
                token = (b * num_tokens + t) * num_heads + h
                at, now = token * N, (t - start) * size
                G_, q_t, dy_t = pointer(G, 0), pointer(q, at), pointer(dy, at)
                if len(form.norm_guard):
                    _read_gradient(form, G_, pointer(S, now + size), norms[t - start], q_t, dy_t)
                rho, pi = retention[token], pointer(rule_weights, 3 * token)
                by_retention, by_outer, by_swapped, by_diagonal = write_gradient(
                    form, pointer(identity, 0), G_, pointer(transposed, 0), pointer(S, now),
                    rho, weigh_rules(form, write[token], pi),
                    q_t, pointer(k, at), pointer(v, at), pointer(d, at), dy_t,
                    pointer(dk, at), pointer(dv, at), pointer(dd, at),
                )  # fmt: skip
                if len(form.mixed):
                    by_symmetric = (by_outer + by_swapped) / 2
                    drule_weights[3 * token] = write[token] * by_outer
                    drule_weights[3 * token + 1] = write[token] * by_diagonal
                    drule_weights[3 * token + 2] = write[token] * by_symmetric
                    by_outer = pi[0] * by_outer + pi[1] * by_diagonal + pi[2] * by_symmetric
                dlog_retention[token] = rho * (by_retention - by_outer)
        for n in range(size):
            dinitial[row * size + n] = G[n]


def choose_interval(N: int) -> int:
    """Return the tokens between saved states: those recomputed in between have to fit in cache."""
    return max(16, min(64, (1 << 14) // (N * N)))


def _run_forward(
    initial: Tensor, q: Tensor, k: Tensor, v: Tensor, d: Tensor | None, log_retention: Tensor,
    rule_weights: Tensor | None, lengths: Tensor | None, norm_guard: bool, *, saves: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    B, T, H, N = q.shape
    form = _ScanForm((0,) * N, (0,) * (rule_weights is not None), (0,) * norm_guard)
    interval = choose_interval(N) if saves else 0
    checkpoints = q.new_empty(B, H, -(-T // interval) if interval else 0, N, N)
    retention, write = log_retention.exp(), log_retention.expm1().neg_()  # [B, T, H]
    counts = torch.full((B,), T) if lengths is None else lengths
    y = q.new_empty(q.shape) if lengths is None else q.new_zeros(q.shape)  # [B, T, H, N]
    final = q.new_empty(initial.shape)  # [B, H, N, N]
    # Without rules, no kernel reads what stands in for d and for the rule weights.
    rules = (q, write) if d is None or rule_weights is None else (d, rule_weights)
    tokens = (q, k, v, rules[0], retention, write, rules[1])
    inputs = (*tokens, initial, counts, T, H, interval, y, final, checkpoints)
    run_rows(_scan_rows, form, B * H, T * N * N, *inputs)
    return y, final, retention, write, checkpoints


def _run_backward(
    q: Tensor, k: Tensor, v: Tensor, d: Tensor | None, rule_weights: Tensor | None,
    lengths: Tensor | None, retention: Tensor, write: Tensor, checkpoints: Tensor, norm_guard: bool,
    dy: Tensor, dfinal: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    B, T, H, N = q.shape
    form = _ScanForm((0,) * N, (0,) * (rule_weights is not None), (0,) * norm_guard)
    allocate = q.new_empty if lengths is None else q.new_zeros
    dq, dk, dv = allocate(q.shape), allocate(q.shape), allocate(q.shape)  # [B, T, H, N]
    dlog_retention, dinitial = allocate(retention.shape), q.new_empty(dfinal.shape)
    rules, drules = (q, write), (dq, dlog_retention)  # without rules neither read nor written
    if d is not None and rule_weights is not None:
        rules, drules = (d, rule_weights), (allocate(d.shape), allocate(rule_weights.shape))
    counts = torch.full((B,), T) if lengths is None else lengths
    tokens = (q, k, v, rules[0], retention, write, rules[1])
    inputs = (*tokens, counts, T, H, choose_interval(N), checkpoints, dy, dfinal)
    grads = (dq, dk, dv, drules[0], dlog_retention, drules[1])
    run_rows(_backward_rows, form, B * H, T * N * N, *inputs, *grads, dinitial)
    return dinitial, *grads


_scan = declare_operator(
    "scan_matrix_state",
    _run_forward,
    backward=_run_backward,
    results="y final",
    saved="retention write checkpoints",
    gradients="initial q k v d log_retention rule_weights",
)


def scan_native(
    tokens: TokenInputs, *, initial_state: Tensor, lengths: Tensor | None, norm_guard: bool
) -> tuple[Tensor, Tensor]:
    """Compute E1 to E4 with compiled loops on the CPU; arguments as in ``scan_matrix_state``.

    Cost: O(T N^2) time a head, rows and heads spread over threads; the backward pass needs one
        saved state per 64 tokens at N <= 16, per 16 at N >= 32.
    """
    y, final_state = _scan(initial_state, *tokens[:-1], lengths, norm_guard)
    return y, final_state
