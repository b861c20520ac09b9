"""Matrix state in Numba: a fused scan over the tokens of each (row, head), with its own backward.

A row of a head's matrix is one value in vector registers (``_Lanes``). Plain loops over elements
took six times as long: the compiler cannot prove that the arrays do not overlap.

The forward scan keeps S transposed, ``[address, payload]``: the readout S q is then a sum of rows.
The backward keeps ``[payload, address]`` instead, which makes S^T dy a sum of rows. Writing and
reading a token is the same code in both, with k and v (and q and dy) exchanged.

The forward saves one state per few tokens and the backward recomputes the ones in between.
"""
# mypy: allow-untyped-defs

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, register_model
from torch import Tensor
from torch.autograd.function import once_differentiable

from unimatrix.ops.matrix_state.reference import TokenInputs
from unimatrix.ops.threads import map_rows

# Fused multiply-add and free order of sums; NaN, infinity and division keep their meaning.
_FASTMATH = ("reassoc", "contract", "nsz")
_OPTIONS = {"nogil": True, "error_model": "numpy", "fastmath": set(_FASTMATH)}

_MIN_THREADED_WORK = 1 << 19  # multiply-adds; below, waking a thread costs more than it saves


class _Lanes(types.Type):
    """Compile-time type of a few neighbouring numbers held in vector registers."""

    def __init__(self, dtype: types.Type, width: int) -> None:
        self.dtype, self.width = dtype, width
        super().__init__(name=f"Lanes({dtype}, {width})")


@register_model(_Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, lanes: _Lanes) -> None:
        element = manager.lookup(lanes.dtype).get_value_type()
        super().__init__(manager, lanes, ir.VectorType(element, lanes.width))


def _spread(builder: Any, value: Any, vector: Any) -> Any:
    """Return ``value`` in every lane; a vector is returned as it is."""
    if value.type == vector:
        return value
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.IntType(32)(0))
    everywhere = ir.Constant(ir.VectorType(ir.IntType(32), vector.count), None)
    return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), everywhere)


@intrinsic
def _pointer(_: Any, array: Any, offset: Any) -> Any:
    """Return the address of ``array[offset]``; passing it on counts no reference."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.gep(context.make_array(array)(context, builder, args[0]).data, [args[1]])

    return types.CPointer(array.dtype)(array, types.intp), generate


@intrinsic
def _load(_: Any, pointer: Any, offset: Any, width: Any) -> Any:
    """Return the ``len(width)`` neighbours from ``pointer[offset]`` on."""
    lanes = _Lanes(pointer.dtype, width.count)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = context.get_value_type(lanes).as_pointer()
        start = builder.bitcast(builder.gep(args[0], [args[1]]), vector)
        return builder.load(start, align=pointer.dtype.bitwidth // 8)

    return lanes(pointer, types.intp, width), generate


@intrinsic
def _store(_: Any, pointer: Any, offset: Any, lanes: Any) -> Any:
    """Write ``lanes`` to ``pointer[offset]`` and its neighbours."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = context.get_value_type(lanes).as_pointer()
        start = builder.bitcast(builder.gep(args[0], [args[1]]), vector)
        builder.store(args[2], start, align=pointer.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(pointer, types.intp, lanes), generate


@intrinsic
def _zeros(_: Any, pointer: Any, width: Any) -> Any:
    """Return ``len(width)`` zeros of the dtype that ``pointer`` points to."""
    lanes = _Lanes(pointer.dtype, width.count)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return ir.Constant(context.get_value_type(lanes), None)

    return lanes(pointer, width), generate


def _define_arithmetic(instruction: str) -> Any:
    """Return ``f(lanes, other) -> lanes`` for an LLVM instruction; ``other``: a number or lanes."""

    @intrinsic
    def combine(_: Any, lanes: Any, other: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            second = _spread(builder, args[1], args[0].type)
            return getattr(builder, instruction)(args[0], second, flags=_FASTMATH)

        return lanes(lanes, lanes if isinstance(other, _Lanes) else lanes.dtype), generate

    return combine


_plus, _times = _define_arithmetic("fadd"), _define_arithmetic("fmul")


@intrinsic
def _plus_at(_: Any, lanes: Any, index: Any, other: Any) -> Any:
    """Return ``lanes`` with ``other``, or its lane, added in lane ``index`` alone."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        indices = ir.VectorType(ir.IntType(64), lanes.width)
        every = ir.Constant(indices, list(range(lanes.width)))
        here = builder.icmp_signed("==", every, _spread(builder, args[1], indices))
        second = _spread(builder, args[2], args[0].type)
        return builder.select(here, builder.fadd(args[0], second), args[0])

    return lanes(lanes, types.int64, other), generate


@intrinsic
def _total(_: Any, lanes: Any) -> Any:
    """Return the sum over the lanes."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = args[0].type
        reduce = builder.module.declare_intrinsic(
            f"llvm.vector.reduce.fadd.v{lanes.width}f{lanes.dtype.bitwidth}",
            fnty=ir.FunctionType(vector.element, [vector.element, vector]),
        )
        return builder.call(reduce, [vector.element(-0.0), args[0]], fastmath=_FASTMATH)

    return lanes.dtype(lanes), generate


class _Form(NamedTuple):
    """What a kernel is compiled for, as tuples: their lengths are part of the Numba type."""

    width: tuple[int, ...]  # N zeros
    mixed: tuple[int, ...]  # empty: the outer rule alone
    norm_guard: tuple[int, ...]  # empty: no norm guard


@numba.njit(**_OPTIONS)
def _weigh_rules(form, write, pi):
    """Return the factors of k v^T, v k^T and Diag(d) in (1 - rho) U."""
    outer, swapped, diagonal = 1.0, 0.0, 0.0
    if len(form.mixed):
        swapped, diagonal = pi[2] / 2, float(pi[1])
        outer = pi[0] + swapped
    return write * outer, write * swapped, write * diagonal


@numba.njit(**_OPTIONS)
def _write_and_read(form, source, target, retention, factors, rows, columns, d, reader, out):
    """Write a token (E1, E2), divide by the norm (E3), read it (E4); return the norm."""
    N, width = len(form.width), form.width
    outer, swapped, diagonal = factors
    written = _times(_load(columns, 0, width), outer)
    other = _times(_load(rows, 0, width), swapped)
    corner = _times(_load(d, 0, width), diagonal)
    result, squares = _zeros(source, width), _zeros(source, width)
    for i in range(N):
        row = _times(_load(source, i * N, width), retention)
        row = _plus(row, _times(written, rows[i]))
        if len(form.mixed):
            row = _plus(row, _times(other, columns[i]))
            row = _plus_at(row, i, corner)
        if len(form.norm_guard):
            squares = _plus(squares, _times(row, row))
        _store(target, i * N, row)
        result = _plus(result, _times(row, reader[i]))
    norm = math.sqrt(_total(squares))
    if norm > 1:
        scale = 1 / norm
        result = _times(result, scale)
        for i in range(N):
            _store(target, i * N, _times(_load(target, i * N, width), scale))
    _store(out, 0, result)
    return norm


@numba.njit(**_OPTIONS)
def _read_gradient(form, G, after, norm, q, dy):
    """Add dy q^T to G, then turn it into the gradient before the division by the norm."""
    N, width = len(form.width), form.width
    query, along = _load(q, 0, width), _zeros(G, width)
    for i in range(N):
        row = _plus(_load(G, i * N, width), _times(query, dy[i]))
        _store(G, i * N, row)
        along = _plus(along, _times(row, _load(after, i * N, width)))
    if norm > 1:
        scale = 1 / norm
        outward = -_total(along)
        for i in range(N):
            row = _plus(_load(G, i * N, width), _times(_load(after, i * N, width), outward))
            _store(G, i * N, _times(row, scale))


@numba.njit(**_OPTIONS)
def _write_gradient(form, G, before, retention, factors, q, k, v, d, dy, dk, dv, dd):
    """Set dk, dv, dd; carry G over the token; return d loss / d (retention, factors)."""
    N, width = len(form.width), form.width
    outer, swapped, diagonal = factors
    query, payload, address = _load(q, 0, width), _load(k, 0, width), _load(v, 0, width)
    kept, Gv, Gk = _zeros(G, width), _zeros(G, width), _zeros(G, width)
    vG, kG, corner = _zeros(G, width), _zeros(G, width), _zeros(G, width)
    for i in range(N):
        row = _load(G, i * N, width)
        if not len(form.norm_guard):
            row = _plus(row, _times(query, dy[i]))
        kept = _plus(kept, _times(row, _load(before, i * N, width)))
        kG = _plus(kG, _times(row, k[i]))
        Gv = _plus_at(Gv, i, _total(_times(row, address)))
        if len(form.mixed):
            vG = _plus(vG, _times(row, v[i]))
            Gk = _plus_at(Gk, i, _total(_times(row, payload)))
            corner = _plus_at(corner, i, row)
        _store(G, i * N, _times(row, retention))
    _store(dk, 0, _plus(_times(Gv, outer), _times(vG, swapped)))
    _store(dv, 0, _plus(_times(kG, outer), _times(Gk, swapped)))
    if len(form.mixed):
        _store(dd, 0, _times(corner, diagonal))
    by_diagonal = _total(_times(corner, _load(d, 0, width)))
    by_outer, by_swapped = _total(_times(kG, address)), _total(_times(vG, payload))
    return _total(kept), by_outer, by_swapped, by_diagonal


@numba.njit(cache=True, **_OPTIONS)
def _scan_rows(
    first, last, form, q, k, v, d, retention, write, rule_weights, initial, lengths,
    num_tokens, num_heads, interval, y, final, checkpoints,
):  # fmt: skip
    N = len(form.width)
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
            _write_and_read(
                form, _pointer(S, 0), _pointer(S, 0), retention[token],
                _weigh_rules(form, write[token], _pointer(rule_weights, 3 * token)),
                _pointer(v, at), _pointer(k, at), _pointer(d, at),
                _pointer(q, at), _pointer(y, at),
            )  # fmt: skip
        for i in range(N):
            for j in range(N):
                final[(row * N + i) * N + j] = S[j * N + i]


@numba.njit(cache=True, **_OPTIONS)
def _backward_rows(
    first, last, form, q, k, v, d, retention, write, rule_weights, lengths,
    num_tokens, num_heads, interval, checkpoints, dy, dfinal,
    dq, dk, dv, dd, dlog_retention, drule_weights, dinitial,
):  # fmt: skip
    N = len(form.width)
    size = N * N
    G = np.empty(size, dq.dtype)  # d loss / d S of the token at hand, [payload, address]
    S = np.empty((interval + 1) * size, dq.dtype)  # the states around a few tokens
    norms = np.empty(interval, dq.dtype)
    num_checkpoints = checkpoints.size // (lengths.size * num_heads * size)
    for row in range(first, last):
        b, h = row // num_heads, row % num_heads
        for n in range(size):
            G[n] = dfinal[row * size + n]
        for chunk in range((lengths[b] - 1) // interval, -1, -1):
            start, stop = chunk * interval, min((chunk + 1) * interval, lengths[b])
            for n in range(size):
                S[n] = checkpoints[(row * num_checkpoints + chunk) * size + n]
            for t in range(start, stop):
                token = (b * num_tokens + t) * num_heads + h
                at, now = token * N, (t - start) * size
                norms[t - start] = _write_and_read(
                    form, _pointer(S, now), _pointer(S, now + size), retention[token],
                    _weigh_rules(form, write[token], _pointer(rule_weights, 3 * token)),
                    _pointer(k, at), _pointer(v, at), _pointer(d, at),
                    _pointer(dy, at), _pointer(dq, at),
                )  # fmt: skip
            for t in range(stop - 1, start - 1, -1):
                token = (b * num_tokens + t) * num_heads + h
                at, now = token * N, (t - start) * size
                G_, q_t, dy_t = _pointer(G, 0), _pointer(q, at), _pointer(dy, at)
                if len(form.norm_guard):
                    _read_gradient(form, G_, _pointer(S, now + size), norms[t - start], q_t, dy_t)
                rho, pi = retention[token], _pointer(rule_weights, 3 * token)
                kept, by_outer, by_swapped, by_diagonal = _write_gradient(
                    form, G_, _pointer(S, now), rho, _weigh_rules(form, write[token], pi),
                    q_t, _pointer(k, at), _pointer(v, at), _pointer(d, at), dy_t,
                    _pointer(dk, at), _pointer(dv, at), _pointer(dd, at),
                )  # fmt: skip
                if len(form.mixed):
                    by_symmetric = (by_outer + by_swapped) / 2
                    drule_weights[3 * token] = write[token] * by_outer
                    drule_weights[3 * token + 1] = write[token] * by_diagonal
                    drule_weights[3 * token + 2] = write[token] * by_symmetric
                    by_outer = pi[0] * by_outer + pi[1] * by_diagonal + pi[2] * by_symmetric
                dlog_retention[token] = rho * (kept - by_outer)
        for n in range(size):
            dinitial[row * size + n] = G[n]


def _run(kernel: Callable[..., None], form: _Form, q: Tensor, *args: Tensor | int) -> None:
    """Run ``kernel`` on q, ``args``: over the rows (B, H), in threads if there is enough to do."""
    num_rows = q.shape[0] * q.shape[2]
    flat = (
        x if isinstance(x, int) else x.detach().contiguous().view(-1).numpy() for x in (q, *args)
    )
    if q.numel() * q.shape[3] < _MIN_THREADED_WORK:
        kernel(0, num_rows, form, *flat)
    else:
        map_rows(kernel, num_rows, form, *flat)


class _Scan(torch.autograd.Function):
    """The scan with its backward kernel; not differentiable twice."""

    @staticmethod
    def forward(
        ctx: Any, norm_guard: bool, saves: bool, lengths: Tensor | None, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        initial, *tokens = tensors
        q, k, v, d, log_retention, rule_weights = TokenInputs(*tokens)
        B, T, H, N = q.shape
        form = _Form((0,) * N, (0,) * (rule_weights is not None), (0,) * norm_guard)
        # A state per so many tokens is saved: the ones recomputed in between have to fit in cache.
        interval = max(16, min(64, (1 << 14) // (N * N))) if saves else 0
        checkpoints = q.new_empty(B, H, -(-T // interval) if interval else 0, N, N)
        retention, write = log_retention.exp(), log_retention.expm1().neg_()  # [B, T, H]
        # Without rules, no kernel reads what stands in for d and for the rule weights.
        rules = (q, write) if d is None or rule_weights is None else (d, rule_weights)
        inputs = (q, k, v, rules[0], retention, write, rules[1])
        counts = torch.full((B,), T) if lengths is None else lengths
        y = q.new_empty(q.shape) if lengths is None else q.new_zeros(q.shape)  # [B, T, H, N]
        final_state = q.new_empty(initial.shape)  # [B, H, N, N]
        outputs = (y, final_state, checkpoints)
        _run(_scan_rows, form, *inputs, initial, counts, T, H, interval, *outputs)
        ctx.save_for_backward(*inputs, counts, checkpoints)
        ctx.form, ctx.interval, ctx.padded = form, interval, lengths is not None
        return y, final_state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, counts, checkpoints = ctx.saved_tensors
        q, _, _, _, retention, _, rule_weights = inputs
        allocate = q.new_zeros if ctx.padded else q.new_empty
        dq, dk, dv = allocate(q.shape), allocate(q.shape), allocate(q.shape)  # [B, T, H, N]
        dlog_retention, dinitial = allocate(retention.shape), q.new_empty(dfinal.shape)
        dd, drule_weights = dq, dlog_retention  # not written without rules
        if ctx.form.mixed:
            dd, drule_weights = allocate(q.shape), allocate(rule_weights.shape)
        grads = (dq, dk, dv, dd, dlog_retention, drule_weights)
        given = (*inputs, counts, *q.shape[1:3], ctx.interval, checkpoints, dy, dfinal)
        _run(_backward_rows, ctx.form, *given, *grads, dinitial)
        if not ctx.form.mixed:
            return None, None, None, dinitial, dq, dk, dv, None, dlog_retention, None
        return None, None, None, dinitial, *grads


def scan_native(
    tokens: TokenInputs, *, initial_state: Tensor, lengths: Tensor | None, norm_guard: bool
) -> tuple[Tensor, Tensor]:
    """Compute E1 to E4 with compiled loops on the CPU; arguments as in ``scan_matrix_state``.

    Cost: O(T N^2) time a head, rows and heads spread over threads; the backward pass needs one
        saved state per 64 tokens at N <= 16, per 16 at N >= 32.
    """
    tensors = (initial_state, *tokens)
    saves = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    outputs: tuple[Tensor, Tensor] = _Scan.apply(norm_guard, saves, lengths, *tensors)
    return outputs
