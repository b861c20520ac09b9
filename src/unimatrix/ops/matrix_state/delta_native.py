"""The delta rule in Numba: a fused scan over the tokens of each (row, head), with its own backward.

As in ``native``, S is stored transposed, ``[address, payload]``: what an address held and the
readout are then sums of rows, taken in one pass. The forward saves one state per few tokens and the
backward recomputes the ones in between.
"""
# mypy: allow-untyped-defs

import numpy as np
import torch
from torch import Tensor

from unimatrix.ops.matrix_state.native import choose_interval
from unimatrix.ops.matrix_state.reference import TokenInputs
from unimatrix.ops.numba.compile import kernel, part
from unimatrix.ops.numba.lanes import OPTIONS, load, plus, pointer, store, times, total, zeros
from unimatrix.ops.numba.threads import run_rows
from unimatrix.ops.operator import declare_operator


@part(**OPTIONS)
def replace_and_read(width, source, target, retention, strength, q, k, v, held, written, out):
    """Replace what the address held (E18) and read (E4), both of one token.

    ``held`` becomes S v before the token, ``written`` the payload added, ``out`` the readout.
    """
    N = len(width)
    stored, read = zeros(source, width), zeros(source, width)
    for i in range(N):
        row = load(source, i * N, width)
        stored = plus(stored, times(row, v[i]))
        read = plus(read, times(row, q[i]))
    added = times(plus(load(k, 0, width), times(stored, -retention)), strength)
    for i in range(N):
        row = times(load(source, i * N, width), retention)
        store(target, i * N, plus(row, times(added, v[i])))
    match = total(times(load(q, 0, width), load(v, 0, width)))
    store(held, 0, stored)
    store(written, 0, added)
    store(out, 0, plus(times(read, retention), times(added, match)))


@part(**OPTIONS)
def _carry_gradient(width, G, before, retention, strength, q, k, v, held, written, dy, dq, dk, dv):
    """Set dq, dk, dv; carry G over the token; return d loss / d (log retention, strength)."""
    N = len(width)
    readout, added, du = load(dy, 0, width), load(written, 0, width), zeros(G, width)
    for i in range(N):
        row = plus(load(G, i * N, width), times(readout, q[i]))
        du = plus(du, times(row, v[i]))
        store(G, i * N, row)
    fresh = plus(load(k, 0, width), times(load(held, 0, width), -retention))
    by_strength = total(times(du, fresh))
    store(dk, 0, times(du, strength))
    erased = times(du, -strength)  # d loss / d (retention * held)
    dmatch = total(times(added, readout))  # by q . v
    by_retention = zeros(G, width)
    for i in range(N):
        row, old = load(G, i * N, width), times(load(before, i * N, width), retention)
        dv[i] = total(plus(times(row, added), times(old, erased)))
        dq[i] = total(times(old, readout)) + dmatch * v[i]
        row = plus(row, times(erased, v[i]))
        by_retention = plus(by_retention, times(row, old))
        store(G, i * N, times(row, retention))
    return total(by_retention), by_strength


@kernel(**OPTIONS)
def _scan_rows(
    first, last, width, q, k, v, retention, strength, initial, lengths,
    num_tokens, num_heads, interval, y, final, checkpoints,
):  # fmt: skip
    N = len(width)
    S = np.empty(N * N, final.dtype)  # [address, payload]
    spare = np.empty(2 * N, final.dtype)
    num_checkpoints = checkpoints.size // (lengths.size * num_heads * N * N)
    for row in range(first, last):
        b, h = row // num_heads, row % num_heads
        for i in range(N):
            for j in range(N):
                S[j * N + i] = initial[(row * N + i) * N + j]
        for t in range(lengths[b]):
            if interval > 0 and t % interval == 0:
                saved = (row * num_checkpoints + t // interval) * N * N
                for n in range(N * N):
                    checkpoints[saved + n] = S[n]
            token = (b * num_tokens + t) * num_heads + h
            at = token * N
            replace_and_read(
                width, pointer(S, 0), pointer(S, 0), retention[token], strength[token],
                pointer(q, at), pointer(k, at), pointer(v, at),
                pointer(spare, 0), pointer(spare, N), pointer(y, at),
            )  # fmt: skip
        for i in range(N):
            for j in range(N):
                final[(row * N + i) * N + j] = S[j * N + i]


@kernel(**OPTIONS)
def _backward_rows(
    first, last, width, q, k, v, retention, strength, lengths,
    num_tokens, num_heads, interval, checkpoints, dy, dfinal,
    dq, dk, dv, dlog_retention, dstrength, dinitial,
):  # fmt: skip
    N = len(width)
    size = N * N
    G = np.empty(size, dq.dtype)  # gradient of S at the current token, [address, payload]
    S = np.empty((interval + 1) * size, dq.dtype)  # the states around a few tokens
    helds, writtens = np.empty(interval * N, dq.dtype), np.empty(interval * N, dq.dtype)
    spare = np.empty(N, dq.dtype)
    num_checkpoints = checkpoints.size // (lengths.size * num_heads * size)
    for row in range(first, last):
        b, h = row // num_heads, row % num_heads
        for i in range(N):
            for j in range(N):
                G[j * N + i] = dfinal[row * size + i * N + j]
        for chunk in range((lengths[b] - 1) // interval, -1, -1):
            start, stop = chunk * interval, min((chunk + 1) * interval, lengths[b])
            for n in range(size):
                S[n] = checkpoints[(row * num_checkpoints + chunk) * size + n]
            for t in range(start, stop):
                token = (b * num_tokens + t) * num_heads + h
                at, now = token * N, t - start
                replace_and_read(
                    width, pointer(S, now * size), pointer(S, (now + 1) * size),
                    retention[token], strength[token],
                    pointer(q, at), pointer(k, at), pointer(v, at),
                    pointer(helds, now * N), pointer(writtens, now * N), pointer(spare, 0),
                )  # fmt: skip
            for t in range(stop - 1, start - 1, -1):
                token = (b * num_tokens + t) * num_heads + h
                at, now = token * N, t - start
                dlog_retention[token], dstrength[token] = _carry_gradient(
                    width, pointer(G, 0), pointer(S, now * size),
                    retention[token], strength[token],
                    pointer(q, at), pointer(k, at), pointer(v, at),
                    pointer(helds, now * N), pointer(writtens, now * N), pointer(dy, at),
                    pointer(dq, at), pointer(dk, at), pointer(dv, at),
                )  # fmt: skip
        for i in range(N):
            for j in range(N):
                dinitial[row * size + i * N + j] = G[j * N + i]


def _run_forward(
    initial: Tensor, q: Tensor, k: Tensor, v: Tensor, log_retention: Tensor, strength: Tensor,
    lengths: Tensor | None, *, saves: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    B, T, H, N = q.shape
    interval = choose_interval(N) if saves else 0
    checkpoints = q.new_empty(B, H, -(-T // interval) if interval else 0, N, N)
    retention = log_retention.exp()
    counts = torch.full((B,), T) if lengths is None else lengths
    y = q.new_empty(q.shape) if lengths is None else q.new_zeros(q.shape)  # [B, T, H, N]
    final = q.new_empty(initial.shape)  # [B, H, N, N]
    inputs = (q, k, v, retention, strength, initial, counts, T, H, interval, y, final, checkpoints)
    run_rows(_scan_rows, (0,) * N, B * H, T * N * N, *inputs)
    return y, final, retention, checkpoints


def _run_backward(
    q: Tensor, k: Tensor, v: Tensor, strength: Tensor, lengths: Tensor | None, retention: Tensor,
    checkpoints: Tensor, dy: Tensor, dfinal: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    B, T, H, N = q.shape
    allocate = q.new_empty if lengths is None else q.new_zeros
    grads = [allocate(x.shape) for x in (q, k, v, retention, strength)]
    dinitial = q.new_empty(dfinal.shape)
    counts = torch.full((B,), T) if lengths is None else lengths
    inputs = (q, k, v, retention, strength, counts, T, H, choose_interval(N), checkpoints)
    run_rows(_backward_rows, (0,) * N, B * H, T * N * N, *inputs, dy, dfinal, *grads, dinitial)
    return dinitial, *grads


_scan = declare_operator(
    "scan_delta",
    _run_forward,
    backward=_run_backward,
    results="y final",
    saved="retention checkpoints",
    gradients="initial q k v log_retention strength",
)


def scan_delta_native(
    tokens: TokenInputs, *, initial_state: Tensor, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Compute E18 and E4 with compiled loops on the CPU; arguments as in ``scan_matrix_state``.

    Cost: as ``native.scan_native``.
    """
    q, k, v, _, log_retention, _, write_strength = tokens
    y, final_state = _scan(initial_state, q, k, v, log_retention, write_strength, lengths)
    return y, final_state
