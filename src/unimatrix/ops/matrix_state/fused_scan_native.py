"""Matrix state from a layer's projections in Numba: activations, scan and norm in one pass.

The scan is that of ``native.py``. A token's vectors are bound when the scan reaches the token, so
bound vectors are never in memory. The backward pass stores them for a few tokens beside the states.
"""
# mypy: allow-untyped-defs

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from unimatrix.ops.matrix_state.native import (
    choose_interval,
    make_identity,
    weigh_rules,
    write_and_read,
    write_gradient,
)
from unimatrix.ops.matrix_state.reference import READOUT_EPS
from unimatrix.ops.numba.compile import kernel, part
from unimatrix.ops.numba.lanes import (
    OPTIONS,
    at,
    exponential,
    larger,
    load,
    minus,
    over,
    plus,
    pointer,
    prefetch,
    root,
    store,
    times,
    total,
    where_negative,
    zeros,
)
from unimatrix.ops.numba.products import LANES
from unimatrix.ops.numba.threads import run_rows
from unimatrix.ops.operator import declare_operator

_UNIT_EPS = 1e-12
"""That of torch's ``normalize``."""
_AHEAD = 8
"""How many tokens ahead vectors are fetched: a head's vectors are small pieces of memory."""


class _FusedScanForm(NamedTuple):
    """Options of the kernels as tuples, since Numba compiles a kernel for their lengths."""

    lanes: tuple[int, ...]  # of tokens weighed together
    width: tuple[int, ...]  # N zeros
    mixed: tuple[int, ...]  # empty: the outer rule alone
    norm_guard: tuple[int, ...]  # always empty
    unit: tuple[int, ...]  # empty: the vectors come bound, and the readout stays as it is


@part(**OPTIONS)
def _fill_with_ones(numbers):
    for i in range(len(numbers)):
        numbers[i] = 1


@part(**OPTIONS)
def _weigh_tokens(form, controls, num_heads, h, count, scratch, token_weights):
    """Set the weights of up to 16 tokens: retention, its complement and the three rules'.

    Args:
        controls: of the first token.
        count: how many there are.
        scratch: 9 lanes, defined everywhere.
        token_weights: of the first token and the head.
    """
    lanes, W, per_head = form.lanes, len(form.lanes), 4 if len(form.mixed) else 1
    for i in range(W):
        logits = at(controls, min(i, count - 1) * num_heads * per_head)
        scratch[i] = logits[h]
        for n in range(1, per_head):
            scratch[n * W + i] = logits[num_heads + 3 * h + n - 1]
    x, made = load(scratch, 0, lanes), at(scratch, 4 * W)
    ones = plus(zeros(scratch, lanes), 1.0)
    power = exponential(where_negative(x, x, times(x, -1.0)))
    greater = over(ones, plus(ones, power))
    lesser = times(power, greater)
    store(made, 0, where_negative(x, lesser, greater))
    store(made, W, where_negative(x, greater, lesser))
    if len(form.mixed):
        outer, diagonal = load(scratch, W, lanes), load(scratch, 2 * W, lanes)
        symmetric = load(scratch, 3 * W, lanes)
        most = larger(outer, larger(diagonal, symmetric))
        outer, diagonal = exponential(minus(outer, most)), exponential(minus(diagonal, most))
        symmetric = exponential(minus(symmetric, most))
        inverse_sum = over(ones, plus(plus(outer, diagonal), symmetric))
        store(made, 2 * W, times(outer, inverse_sum))
        store(made, 3 * W, times(diagonal, inverse_sum))
        store(made, 4 * W, times(symmetric, inverse_sum))
    for i in range(count):
        for n in range(5 if len(form.mixed) else 2):
            token_weights[5 * num_heads * i + n] = made[n * W + i]


@part(**OPTIONS)
def _invert_lengths(form, vectors, token_stride, vector_stride, count, inverses):
    """Set ``inverses`` to 1 over the lengths of the vectors of up to 16 tokens, by vector.

    Args:
        vectors: of the first token.
        token_stride, vector_stride: numbers from token to token, and from vector to vector.
        count: how many tokens there are.
    """
    lanes, W = form.lanes, len(form.lanes)
    num_vectors = 4 if len(form.mixed) else 3
    for i in range(count):
        for n in range(num_vectors):
            vector = load(vectors, i * token_stride + n * vector_stride, form.width)
            inverses[n * W + i] = total(times(vector, vector))
    least = plus(zeros(inverses, lanes), _UNIT_EPS)
    for n in range(num_vectors):
        length = larger(least, root(load(inverses, n * W, lanes)))
        store(inverses, n * W, over(plus(zeros(inverses, lanes), 1.0), length))


@part(**OPTIONS)
def _unbind(form, gradient, unit, inverse):
    """Turn the gradient of a unit vector into that of the vector, in place."""
    unit_lanes, dunit = load(unit, 0, form.width), load(gradient, 0, form.width)
    component = total(times(unit_lanes, dunit)) if inverse * _UNIT_EPS < 1 else 0.0
    store(gradient, 0, times(plus(dunit, times(unit_lanes, -component)), inverse))


@part(**OPTIONS)
def _normalize_readouts(form, y, num_heads, count, scratch, inverses):
    """Divide readouts of up to 16 tokens by the roots of their mean squares.

    Args:
        y: of the first token and the head.
        count: how many tokens there are.
        scratch: one lane, defined everywhere.
        inverses: of the first token and the head; set to 1 over those roots.
    """
    lanes, N = form.lanes, len(form.width)
    for i in range(count):
        vector = load(y, i * num_heads * N, form.width)
        scratch[i] = total(times(vector, vector)) / N + READOUT_EPS
    store(scratch, 0, over(plus(zeros(scratch, lanes), 1.0), root(load(scratch, 0, lanes))))
    for i in range(count):
        place, inverses[i * num_heads] = i * num_heads * N, scratch[i]
        store(y, place, times(load(y, place, form.width), scratch[i]))


@part(**OPTIONS)
def _normalize_readout_backward(form, dy, y, inverse, dreadout):
    """Set ``dreadout`` to the gradient of a readout from that of the normalised one."""
    dy_lanes, y_lanes = load(dy, 0, form.width), load(y, 0, form.width)
    component = total(times(dy_lanes, y_lanes)) / len(form.width)
    store(dreadout, 0, times(plus(dy_lanes, times(y_lanes, -component)), inverse))


@kernel(**OPTIONS)
def _scan_rows(
    first, last, form, vectors, controls, initial, lengths,
    num_tokens, num_heads, interval, y, final, checkpoints, token_weights, inverses,
):  # fmt: skip
    N, W = len(form.width), len(form.lanes)
    num_vectors = 4 if len(form.mixed) else 3
    num_controls = num_heads * (4 if len(form.mixed) else 1)
    token_stride = len(vectors) // (lengths.size * num_tokens)
    identity = make_identity(N, final)
    S = np.empty(N * N, final.dtype)  # [address, payload]
    units = np.empty(4 * N, final.dtype)  # q, k, v, d
    scratch = np.empty(9 * W, final.dtype)
    inverse_lengths = np.empty(4 * W, final.dtype)
    _fill_with_ones(scratch)
    _fill_with_ones(inverse_lengths)
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
            position = b * num_tokens + t
            token = position * num_heads + h
            weigh = pointer(token_weights, 5 * token)
            vector_stride = num_heads * N
            token_vectors = pointer(vectors, position * token_stride + h * N)
            for n in range(num_vectors):
                prefetch(token_vectors, _AHEAD * token_stride + n * vector_stride)
            if t % W == 0:
                count = min(W, lengths[b] - t)
                _weigh_tokens(
                    form, pointer(controls, position * num_controls), num_heads, h, count,
                    pointer(scratch, 0), weigh,
                )  # fmt: skip
                if len(form.unit):
                    _invert_lengths(
                        form, token_vectors, token_stride, vector_stride, count,
                        pointer(inverse_lengths, 0),
                    )  # fmt: skip
            if len(form.unit):
                for n in range(num_vectors):
                    inverse = inverse_lengths[n * W + t % W]
                    unit = times(load(token_vectors, n * vector_stride, form.width), inverse)
                    store(pointer(units, 0), n * N, unit)
                token_vectors, vector_stride = pointer(units, 0), N
            q, k = at(token_vectors, 0), at(token_vectors, vector_stride)
            v = at(token_vectors, 2 * vector_stride)
            d = at(token_vectors, (num_vectors - 1) * vector_stride)
            out = pointer(y, token * N)
            write_and_read(
                form, pointer(identity, 0), pointer(S, 0), pointer(S, 0), weigh[0],
                weigh_rules(form, weigh[1], at(weigh, 2)), v, k, d, q, out,
            )  # fmt: skip
            if len(form.unit) and (t % W == W - 1 or t == lengths[b] - 1):
                first_token = token - t % W * num_heads
                _normalize_readouts(
                    form, pointer(y, first_token * N), num_heads, t % W + 1,
                    pointer(scratch, 0), pointer(inverses, first_token),
                )  # fmt: skip
        for i in range(N):
            for j in range(N):
                final[(row * N + i) * N + j] = S[j * N + i]


@part(**OPTIONS)
def _bind_token(form, vectors, vector_stride, inverse_lengths, dy, y, inverse, bound):
    """Set ``bound`` to a token's q, k, v, d and dy, bound, and 1 over the lengths of the former."""
    N = len(form.width)
    num_vectors = 4 if len(form.mixed) else 3
    if len(form.unit):
        for n in range(num_vectors):
            bound[5 * N + n] = inverse_lengths[n * len(form.lanes)]
            unit = times(load(vectors, n * vector_stride, form.width), bound[5 * N + n])
            store(bound, n * N, unit)
        _normalize_readout_backward(form, dy, y, inverse, at(bound, 4 * N))
    else:
        for n in range(num_vectors):
            store(bound, n * N, load(vectors, n * vector_stride, form.width))
        store(bound, 4 * N, load(dy, 0, form.width))


@part(**OPTIONS)
def _weigh_token_backward(form, weights, grads, num_heads, h, dcontrols):
    """Set the gradients of a token's logits from those of retention and of the rules' factors."""
    by_retention, by_outer, by_swapped, by_diagonal = grads
    rho, write = weights[0], weights[1]
    if len(form.mixed):
        outer, diagonal, symmetric = weights[2], weights[3], weights[4]
        by_symmetric = (by_outer + by_swapped) / 2
        mean = outer * by_outer + diagonal * by_diagonal + symmetric * by_symmetric
        first = num_heads + 3 * h
        dcontrols[first] = write * outer * (by_outer - mean)
        dcontrols[first + 1] = write * diagonal * (by_diagonal - mean)
        dcontrols[first + 2] = write * symmetric * (by_symmetric - mean)
        by_outer = mean
    dcontrols[h] = rho * write * (by_retention - by_outer)


@kernel(**OPTIONS)
def _backward_rows(
    first, last, form, vectors, token_weights, lengths, num_tokens, num_heads, interval,
    checkpoints, y, inverses, dy, dfinal, dvectors, dcontrols, dinitial,
):  # fmt: skip
    N, W = len(form.width), len(form.lanes)
    size, vector_stride = N * N, num_heads * N
    num_vectors = 4 if len(form.mixed) else 3
    num_controls = num_heads * (4 if len(form.mixed) else 1)
    token_stride = len(vectors) // (lengths.size * num_tokens)
    G = np.empty(size, dvectors.dtype)  # gradient of S at the current token, [payload, address]
    transposed = np.empty(size, dvectors.dtype)
    identity = make_identity(N, G)
    S = np.empty((interval + 1) * size, dvectors.dtype)  # the states around a few tokens
    num_bound = 5 * N + 4
    bound = np.empty(interval * num_bound, dvectors.dtype)  # of these tokens: see _bind_token
    inverse_lengths = np.empty(4 * W, dvectors.dtype)
    _fill_with_ones(inverse_lengths)
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
                position = b * num_tokens + t
                token, place = position * num_heads + h, position * token_stride + h * N
                of_token, now = pointer(bound, (t - start) * num_bound), (t - start) * size
                for n in range(num_vectors):
                    ahead = place + _AHEAD * token_stride + n * vector_stride
                    prefetch(pointer(vectors, ahead), 0)
                    prefetch(pointer(dvectors, ahead), 0)
                prefetch(pointer(dy, (token + _AHEAD * num_heads) * N), 0)
                prefetch(pointer(y, (token + _AHEAD * num_heads) * N), 0)
                if len(form.unit) and (t - start) % W == 0:
                    _invert_lengths(
                        form, pointer(vectors, place), token_stride, vector_stride,
                        min(W, stop - t), pointer(inverse_lengths, 0),
                    )  # fmt: skip
                _bind_token(
                    form, pointer(vectors, place), vector_stride,
                    pointer(inverse_lengths, (t - start) % W),
                    pointer(dy, token * N), pointer(y, token * N), inverses[token], of_token,
                )  # fmt: skip
                weigh = pointer(token_weights, 5 * token)
                write_and_read(
                    form, pointer(identity, 0), pointer(S, now), pointer(S, now + size), weigh[0],
                    weigh_rules(form, weigh[1], at(weigh, 2)), at(of_token, N),
                    at(of_token, 2 * N), at(of_token, 3 * N),
                    at(of_token, 4 * N), pointer(dvectors, place),
                )  # fmt: skip
            for t in range(stop - 1, start - 1, -1):
                position = b * num_tokens + t
                token, place = position * num_heads + h, position * token_stride + h * N
                of_token, now = pointer(bound, (t - start) * num_bound), (t - start) * size
                weigh, grads = pointer(token_weights, 5 * token), pointer(dvectors, place)
                by_weights = write_gradient(
                    form, pointer(identity, 0), pointer(G, 0), pointer(transposed, 0),
                    pointer(S, now), weigh[0], weigh_rules(form, weigh[1], at(weigh, 2)),
                    of_token, at(of_token, N), at(of_token, 2 * N), at(of_token, 3 * N),
                    at(of_token, 4 * N), at(grads, vector_stride), at(grads, 2 * vector_stride),
                    at(grads, (num_vectors - 1) * vector_stride),
                )  # fmt: skip
                if len(form.unit):
                    for n in range(num_vectors):
                        dvector, unit = at(grads, n * vector_stride), at(of_token, n * N)
                        _unbind(form, dvector, unit, of_token[5 * N + n])
                of_position = pointer(dcontrols, position * num_controls)
                _weigh_token_backward(form, weigh, by_weights, num_heads, h, of_position)
        for n in range(size):
            dinitial[row * size + n] = G[n]


def run_forward(
    vectors: Tensor, controls: Tensor, initial: Tensor, lengths: Tensor | None, is_mixed: bool,
    unit: bool, *, saves: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Run the forward kernel.

    Args:
        vectors: [B, T, P, H, N]; or [B, T, n], of which the first P H N numbers are read.
        controls: [B, T, H], or [B, T, 4 H] if rules are mixed.
        initial: [B, H, N, N].
        lengths, unit: as in ``bind_and_scan``.
        is_mixed: whether rules are mixed, with P = 4; otherwise it is 3.
        saves: whether the backward kernel will run.

    Returns:
        y [B, T, H, N], the last state [B, H, N, N], and for the backward kernel some of the
        states, the weights of tokens and rules, and 1 over what the readouts were divided by.
    """
    (B, T), (_, H, N, _) = vectors.shape[:2], initial.shape
    interval = choose_interval(N) if saves else 0
    allocate = vectors.new_empty if lengths is None else vectors.new_zeros
    y, inverses, token_weights = allocate(B, T, H, N), allocate(B, T, H), allocate(B, T, H, 5)
    checkpoints = vectors.new_empty(B, H, -(-T // interval) if interval else 0, N, N)
    final = initial.new_empty(initial.shape)
    counts = torch.full((B,), T) if lengths is None else lengths
    inputs = (vectors, controls, initial, counts, T, H, interval)
    results = (y, final, checkpoints, token_weights, inverses)
    form = _FusedScanForm(LANES, (0,) * N, (0,) * is_mixed, (), (0,) * unit)
    run_rows(_scan_rows, form, B * H, T * N * N, *inputs, *results)
    return results


def run_backward(
    vectors: Tensor, lengths: Tensor | None, checkpoints: Tensor, token_weights: Tensor, y: Tensor,
    inverses: Tensor, is_mixed: bool, unit: bool, dy: Tensor, dfinal: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Run the backward kernel; the inputs are those of ``run_forward`` and its results.

    Returns:
        the gradients of vectors (undefined where these are not read), controls and the initial
        state.
    """
    (B, T), (_, H, N, _) = vectors.shape[:2], dfinal.shape
    allocate = vectors.new_empty if lengths is None else vectors.new_zeros
    dvectors, dcontrols = allocate(vectors.shape), allocate(B, T, H * (4 if is_mixed else 1))
    dinitial = dfinal.new_empty(dfinal.shape)
    counts = torch.full((B,), T) if lengths is None else lengths
    inputs = (vectors, token_weights, counts, T, H, choose_interval(N), checkpoints, y, inverses)
    grads = (dvectors, dcontrols, dinitial)
    form = _FusedScanForm(LANES, (0,) * N, (0,) * is_mixed, (), (0,) * unit)
    run_rows(_backward_rows, form, B * H, T * N * N, *inputs, dy, dfinal, *grads)
    return grads


def _make_results(
    vectors: Tensor, controls: Tensor, initial: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    """Return empty tensors like those of ``run_forward``."""
    B, T, _P, H, N = vectors.shape
    y, num_checkpoints = vectors.new_empty(B, T, H, N), -(-T // choose_interval(N))
    shapes = (initial.shape, (B, H, num_checkpoints, N, N), (B, T, H, 5), (B, T, H))
    return y, *(vectors.new_empty(shape) for shape in shapes)


def _make_gradients(
    vectors: Tensor, lengths: Tensor | None, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Return empty tensors like those of ``run_backward``."""
    _, _, y, _, is_mixed, _, _, dfinal = others
    B, T, H, _ = y.shape
    dcontrols = vectors.new_empty(B, T, H * (4 if is_mixed else 1))
    return vectors.new_empty(vectors.shape), dcontrols, dfinal.new_empty(dfinal.shape)


bind_and_scan_native = declare_operator(
    "bind_and_scan",
    run_forward,
    backward=run_backward,
    results="y final",
    saved="checkpoints token_weights inverses",
    gradients="vectors controls initial",
    shapes=_make_results,
    gradient_shapes=_make_gradients,
)
