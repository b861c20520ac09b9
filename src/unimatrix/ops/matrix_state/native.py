"""Matrix state in Numba: a fused scan over the tokens of each (row, head), with its own backward.

One row of a head's matrix is a value in vector registers (``_Lanes``), so the loop over the N rows
becomes N loads, multiply-adds and stores; plain loops over array elements took six times as long,
because the compiler cannot prove that the arrays do not overlap.

The forward scan keeps S transposed, ``[address, payload]``: the readout S q is then a sum of rows.
The backward keeps ``[payload, address]`` instead, which makes S^T dy a sum of rows. Writing and
reading a token is the same code in both, with k and v (and q and dy) exchanged.

The forward saves one state per few tokens and the backward recomputes the ones in between, so
nothing of size T x N x N ever exists.
"""

import functools
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

from unimatrix.ops.threads import map_rows

# Fused multiply-add and free order of sums; NaN, infinity and division keep their meaning.
_FASTMATH = ("reassoc", "contract", "nsz")
_OPTIONS = {"nogil": True, "error_model": "numpy", "fastmath": set(_FASTMATH)}

# Fewer multiply-adds than this and waking a second thread costs more than it saves.
_MIN_THREADED_WORK = 1 << 19


class _Lanes(types.Type):
    """Compile-time type of a few neighbouring numbers held in vector registers."""

    def __init__(self, dtype: types.Type, width: int) -> None:
        self.dtype, self.width = dtype, width
        super().__init__(name=f"Lanes({dtype}, {width})")


@register_model(_Lanes)
class _LanesModel(models.PrimitiveModel):  # type: ignore[misc]
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
        if isinstance(array, types.Array):
            return builder.gep(context.make_array(array)(context, builder, args[0]).data, [args[1]])
        return builder.gep(args[0], [args[1]])

    return types.CPointer(array.dtype)(array, types.intp), generate


@intrinsic(prefer_literal=True)
def _load(_: Any, pointer: Any, offset: Any, width: Any) -> Any:
    """Return the ``width`` neighbours from ``pointer[offset]`` on."""
    lanes = _Lanes(pointer.dtype, width.literal_value)

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


@intrinsic(prefer_literal=True)
def _zeros(_: Any, pointer: Any, width: Any) -> Any:
    """Return ``width`` zeros of the dtype that ``pointer`` points to."""
    lanes = _Lanes(pointer.dtype, width.literal_value)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return ir.Constant(context.get_value_type(lanes), None)

    return lanes(pointer, width), generate


@intrinsic
def _times(_: Any, lanes: Any, factor: Any) -> Any:
    """Return ``lanes * factor``; ``factor`` is a number or lanes."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fmul(args[0], _spread(builder, args[1], args[0].type), flags=_FASTMATH)

    return lanes(lanes, lanes if isinstance(factor, _Lanes) else lanes.dtype), generate


@intrinsic
def _plus(_: Any, lanes: Any, other: Any) -> Any:
    """Return ``lanes + other``; ``other`` is a number or lanes."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fadd(args[0], _spread(builder, args[1], args[0].type), flags=_FASTMATH)

    return lanes(lanes, lanes if isinstance(other, _Lanes) else lanes.dtype), generate


@intrinsic
def _keep(_: Any, lanes: Any, index: Any) -> Any:
    """Return ``lanes`` with 0 in every lane but ``index``."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        indices = ir.VectorType(ir.IntType(64), lanes.width)
        every = ir.Constant(indices, list(range(lanes.width)))
        here = builder.icmp_signed("==", every, _spread(builder, args[1], indices))
        return builder.select(here, args[0], ir.Constant(args[0].type, None))

    return lanes(lanes, types.int64), generate


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


class _Kernels(NamedTuple):
    """The two compiled loops; both take ``(first_row, last_row, ...)`` for ``map_rows``."""

    scan: Callable[..., None]
    backward: Callable[..., None]


@functools.cache
def _compile_kernels(N: int, mixed: bool, norm_guard: bool) -> _Kernels:
    """Return the kernels for heads of N rows; Numba compiles them once a dtype, when called.

    Arrays are flat and contiguous but for q, k, v and d, whose element [b, t, h, 0] is at
    ``strides[i] * b + strides[i + 1] * t + strides[i + 2] * h`` with i = 0, 3, 6, 9. Positions
    past a row's length are not touched.
    """

    @numba.njit(**_OPTIONS)
    def weigh_rules(write, rule_weights):  # type: ignore[no-untyped-def]
        """Return the factors of k v^T, v k^T and Diag(d) in (1 - rho) U."""
        if not mixed:
            return write, 0.0, 0.0
        swapped = write * rule_weights[2] / 2
        return write * rule_weights[0] + swapped, swapped, write * rule_weights[1]

    @numba.njit(**_OPTIONS)
    def write_and_read(  # type: ignore[no-untyped-def]
        source, target, retention, factors, rows, lanes, d, reader, out
    ):
        """Write a token (E1, E2), divide by the norm (E3), read it (E4); return the norm."""
        outer, swapped, diagonal = factors
        written = _times(_load(lanes, 0, N), outer)
        other = _times(_load(rows, 0, N), swapped)
        corner = _zeros(source, N)
        if mixed:
            corner = _times(_load(d, 0, N), diagonal)
        result = _zeros(source, N)
        squares = _zeros(source, N)
        for i in range(N):
            row = _times(_load(source, i * N, N), retention)
            row = _plus(row, _times(written, rows[i]))
            if mixed:
                row = _plus(row, _times(other, lanes[i]))
                row = _plus(row, _keep(corner, i))
            if norm_guard:
                squares = _plus(squares, _times(row, row))
            _store(target, i * N, row)
            result = _plus(result, _times(row, reader[i]))
        norm = math.sqrt(_total(squares))
        if norm > 1:
            scale = 1 / norm
            result = _times(result, scale)
            for i in range(N):
                _store(target, i * N, _times(_load(target, i * N, N), scale))
        _store(out, 0, result)
        return norm

    @numba.njit(**_OPTIONS)
    def read_gradient(G, after, norm, q, dy):  # type: ignore[no-untyped-def]
        """Add dy q^T to G, then turn it into the gradient before the division by the norm."""
        along = _zeros(G, N)
        query = _load(q, 0, N)
        for i in range(N):
            row = _plus(_load(G, i * N, N), _times(query, dy[i]))
            _store(G, i * N, row)
            along = _plus(along, _times(row, _load(after, i * N, N)))
        if norm > 1:
            scale = 1 / norm
            outward = -_total(along)
            for i in range(N):
                row = _plus(_load(G, i * N, N), _times(_load(after, i * N, N), outward))
                _store(G, i * N, _times(row, scale))

    @numba.njit(**_OPTIONS)
    def write_gradient(  # type: ignore[no-untyped-def]
        G, before, retention, factors, q, k, v, d, dy, dk, dv, dd
    ):
        """Set dk, dv, dd; carry G over the token; return d loss / d (retention, factors)."""
        outer, swapped, diagonal = factors
        query, payload, address = _load(q, 0, N), _load(k, 0, N), _load(v, 0, N)
        kept, Gv, Gk = _zeros(G, N), _zeros(G, N), _zeros(G, N)
        vG, kG, corner = _zeros(G, N), _zeros(G, N), _zeros(G, N)
        for i in range(N):
            row = _load(G, i * N, N)
            if not norm_guard:
                row = _plus(row, _times(query, dy[i]))
            kept = _plus(kept, _times(row, _load(before, i * N, N)))
            kG = _plus(kG, _times(row, k[i]))
            Gv = _plus(Gv, _keep(_plus(_zeros(G, N), _total(_times(row, address))), i))
            if mixed:
                vG = _plus(vG, _times(row, v[i]))
                Gk = _plus(Gk, _keep(_plus(_zeros(G, N), _total(_times(row, payload))), i))
                corner = _plus(corner, _keep(row, i))
            _store(G, i * N, _times(row, retention))
        if not mixed:
            _store(dk, 0, _times(Gv, outer))
            _store(dv, 0, _times(kG, outer))
            return _total(kept), _total(_times(kG, address)), 0.0, 0.0
        _store(dk, 0, _plus(_times(Gv, outer), _times(vG, swapped)))
        _store(dv, 0, _plus(_times(kG, outer), _times(Gk, swapped)))
        _store(dd, 0, _times(corner, diagonal))
        by_outer, by_swapped = _total(_times(kG, address)), _total(_times(vG, payload))
        return _total(kept), by_outer, by_swapped, _total(_times(corner, _load(d, 0, N)))

    @numba.njit(cache=True, **_OPTIONS)
    def scan(  # type: ignore[no-untyped-def]
        first, last, q, k, v, d, strides, retention, write, rule_weights, initial, lengths,
        num_tokens, num_heads, interval, y, final, checkpoints,
    ):  # fmt: skip
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
                write_and_read(
                    _pointer(S, 0), _pointer(S, 0), retention[token],
                    weigh_rules(write[token], _pointer(rule_weights, 3 * token)),
                    _pointer(v, b * strides[6] + t * strides[7] + h * strides[8]),
                    _pointer(k, b * strides[3] + t * strides[4] + h * strides[5]),
                    _pointer(d, b * strides[9] + t * strides[10] + h * strides[11]),
                    _pointer(q, b * strides[0] + t * strides[1] + h * strides[2]),
                    _pointer(y, token * N),
                )  # fmt: skip
            for i in range(N):
                for j in range(N):
                    final[(row * N + i) * N + j] = S[j * N + i]

    @numba.njit(cache=True, **_OPTIONS)
    def backward(  # type: ignore[no-untyped-def]
        first, last, q, k, v, d, strides, retention, write, rule_weights, lengths,
        num_tokens, num_heads, interval, checkpoints, dy, dfinal,
        dq, dk, dv, dd, dlog_retention, drule_weights, dinitial,
    ):  # fmt: skip
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
                    norms[t - start] = write_and_read(
                        _pointer(S, (t - start) * size), _pointer(S, (t - start + 1) * size),
                        retention[token],
                        weigh_rules(write[token], _pointer(rule_weights, 3 * token)),
                        _pointer(k, b * strides[3] + t * strides[4] + h * strides[5]),
                        _pointer(v, b * strides[6] + t * strides[7] + h * strides[8]),
                        _pointer(d, b * strides[9] + t * strides[10] + h * strides[11]),
                        _pointer(dy, token * N), _pointer(dq, token * N),
                    )  # fmt: skip
                for t in range(stop - 1, start - 1, -1):
                    token = (b * num_tokens + t) * num_heads + h
                    q_t = _pointer(q, b * strides[0] + t * strides[1] + h * strides[2])
                    if norm_guard:
                        after = _pointer(S, (t - start + 1) * size)
                        dy_t = _pointer(dy, token * N)
                        read_gradient(_pointer(G, 0), after, norms[t - start], q_t, dy_t)
                    rho, pi = retention[token], _pointer(rule_weights, 3 * token)
                    kept, by_outer, by_swapped, by_diagonal = write_gradient(
                        _pointer(G, 0), _pointer(S, (t - start) * size), rho,
                        weigh_rules(write[token], pi), q_t,
                        _pointer(k, b * strides[3] + t * strides[4] + h * strides[5]),
                        _pointer(v, b * strides[6] + t * strides[7] + h * strides[8]),
                        _pointer(d, b * strides[9] + t * strides[10] + h * strides[11]),
                        _pointer(dy, token * N),
                        _pointer(dk, token * N), _pointer(dv, token * N), _pointer(dd, token * N),
                    )  # fmt: skip
                    if mixed:
                        by_symmetric = (by_outer + by_swapped) / 2
                        drule_weights[3 * token] = write[token] * by_outer
                        drule_weights[3 * token + 1] = write[token] * by_diagonal
                        drule_weights[3 * token + 2] = write[token] * by_symmetric
                        by_outer = pi[0] * by_outer + pi[1] * by_diagonal + pi[2] * by_symmetric
                    dlog_retention[token] = rho * (kept - by_outer)
            for n in range(size):
                dinitial[row * size + n] = G[n]

    return _Kernels(scan, backward)


def _find_checkpoint_interval(N: int) -> int:
    """Return the tokens between saved states; the states in between are to fit in cache."""
    return max(16, min(64, (1 << 14) // (N * N)))


def _flatten(x: Tensor) -> Any:
    """Return the elements as one array, without a copy where ``x`` is contiguous."""
    return x.detach().reshape(-1).numpy()


def _flatten_inputs(*inputs: Tensor) -> tuple[Any, ...]:
    """Return each [B, T, H, N] as an array over its storage, then all (B, T, H) strides in one."""
    arrays, strides = [], []
    for x in inputs:
        rows = x if x.stride(3) == 1 else x.contiguous()
        strides += rows.stride()[:3]
        span = 1 + sum((n - 1) * jump for n, jump in zip(rows.shape, rows.stride(), strict=True))
        arrays.append(rows.as_strided((span,), (1,)).numpy())
    return (*arrays, np.array(strides))


def _run(kernel: Callable[..., None], q: Tensor, *args: Any) -> None:
    """Run ``kernel`` over the rows of q [B, T, H, N], in threads if there is enough to do."""
    num_rows = q.shape[0] * q.shape[2]
    if q.numel() * q.shape[3] < _MIN_THREADED_WORK:
        kernel(0, num_rows, *args)
    else:
        map_rows(kernel, num_rows, *args)


class _Scan(torch.autograd.Function):
    """The scan with its backward kernel; not differentiable twice."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        d: Tensor | None,
        log_retention: Tensor,
        rule_weights: Tensor | None,
        initial_state: Tensor,
        lengths: Tensor | None,
        norm_guard: bool,
        saves_states: bool,
    ) -> tuple[Tensor, Tensor]:
        B, T, H, N = q.shape
        interval = _find_checkpoint_interval(N) if saves_states else 0
        num_checkpoints = -(-T // interval) if saves_states else 0
        checkpoints = q.new_empty(B, H, num_checkpoints, N, N)
        retention, write = log_retention.exp(), log_retention.expm1().neg_()  # [B, T, H]
        y = q.new_empty(q.shape) if lengths is None else q.new_zeros(q.shape)  # [B, T, H, N]
        final_state = torch.empty_like(initial_state)  # [B, H, N, N]
        mixed = rule_weights is not None
        scan, ctx.backward_kernel = _compile_kernels(N, mixed, norm_guard)
        ctx.padded = lengths is not None
        if lengths is None:
            lengths = torch.full((B,), T)
        scales = (retention, write, rule_weights if mixed else write)
        inputs = _flatten_inputs(q, k, v, d if mixed else q)
        known = map(_flatten, (*scales, initial_state, lengths))
        found = map(_flatten, (y, final_state, checkpoints))
        _run(scan, q, *inputs, *known, T, H, interval, *found)
        ctx.save_for_backward(q, k, v, d, *scales, lengths, checkpoints)
        ctx.interval, ctx.mixed = interval, mixed
        return y, final_state

    @staticmethod
    @once_differentiable  # type: ignore[misc, untyped-decorator]
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, d, *scales, lengths, checkpoints = ctx.saved_tensors
        retention, _, rule_weights = scales
        B, T, H, N = q.shape
        allocate = q.new_zeros if ctx.padded else q.new_empty
        dq, dk, dv = (allocate(q.shape) for _ in range(3))  # [B, T, H, N]
        dd = allocate(q.shape) if ctx.mixed else dq
        dlog_retention, drule_weights = allocate(retention.shape), allocate(rule_weights.shape)
        dinitial = q.new_empty(B, H, N, N)
        inputs = _flatten_inputs(q, k, v, d if ctx.mixed else q)
        known = map(_flatten, (*scales, lengths))
        cotangents = map(_flatten, (checkpoints, dy, dfinal))
        found = map(_flatten, (dq, dk, dv, dd, dlog_retention, drule_weights, dinitial))
        _run(ctx.backward_kernel, q, *inputs, *known, T, H, ctx.interval, *cotangents, *found)
        if not ctx.mixed:
            dd = drule_weights = None
        return dq, dk, dv, dd, dlog_retention, drule_weights, dinitial, None, None, None


def scan_native(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    d: Tensor | None,
    log_retention: Tensor,
    rule_weights: Tensor | None,
    *,
    initial_state: Tensor,
    lengths: Tensor | None,
    norm_guard: bool,
) -> tuple[Tensor, Tensor]:
    """Compute E1 to E4 with compiled loops; arguments as in ``scan_matrix_state``, on the CPU.

    Cost: O(T N^2) time a head; the backward holds one state per 64 tokens at N = 16 (per 16 from
        N = 32 on). Rows and heads run in threads.
    """
    leaves = (q, k, v, d, log_retention, rule_weights, initial_state)
    saves_states = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in leaves
    )
    outputs: tuple[Tensor, Tensor] = _Scan.apply(*leaves, lengths, norm_guard, saves_states)
    return outputs
