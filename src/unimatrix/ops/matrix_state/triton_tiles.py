"""Parts of the Triton kernels: a chunk's tokens, their retention and rules, sums over all N."""
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl


@triton.jit
def locate_tokens(lengths, row, chunk, T, H, C: tl.constexpr, HAS_LENGTHS: tl.constexpr):
    """Return where a chunk starts in [B, T, H], its tokens from there, which exist or are real."""
    b = row // H
    order = tl.arange(0, C)
    end = T
    if HAS_LENGTHS:
        end = tl.minimum(tl.load(lengths + b), T).to(tl.int32)
    start = (b.to(tl.int64) * T + chunk * C) * H + row % H
    return start, order * H, chunk * C + order < T, chunk * C + order < end


@triton.jit
def load_columns(x, start, token, real, column, N: tl.constexpr, ACC: tl.constexpr):
    """Return columns of the tokens' vectors [C, columns], 0 where there is nothing."""
    mask = real[:, None] & (column < N)[None, :]
    at = token[:, None] * N + column[None, :]
    return tl.load(x + start * N + at, mask=mask, other=0.0).to(ACC)


@triton.jit
def store_columns(x, value, start, token, exists, column, N: tl.constexpr):
    """Store columns of the tokens' vectors."""
    mask = exists[:, None] & (column < N)[None, :]
    at = token[:, None] * N + column[None, :]
    tl.store(x + start * N + at, value.to(x.dtype.element_ty), mask=mask)


@triton.jit
def load_retention(log_retention, start, token, real, C: tl.constexpr, ACC: tl.constexpr):
    """Return ρ, Λ in two parts, exp(Λ_C - Λ_t), all [C], and exp(Λ_C).

    Past tokens that forget nearly all, small differences of large sums matter: the sum is float64.
    """
    log = tl.load(log_retention + start + token, mask=real, other=0.0).to(tl.float64)
    log = tl.where(log < -1000.0, -1000.0, log)  # -inf cannot be subtracted from itself
    total = tl.cumsum(log, 0)
    last = tl.sum(tl.where(tl.arange(0, C) == C - 1, total, 0.0), 0)
    high = total.to(ACC)
    low = (total - high.to(tl.float64)).to(ACC)
    return tl.exp(log), high, low, tl.exp((last - total).to(ACC)), tl.exp(last.to(ACC))


@triton.jit
def retain_between(high, low, C: tl.constexpr):
    """Return E [C, C]."""
    order = tl.arange(0, C)
    difference = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
    return tl.exp(tl.where(order[:, None] >= order[None, :], difference, -float("inf")))


@triton.jit
def load_rules(rule_weights, start, token, real, ACC: tl.constexpr):
    """Return the weights of the outer, diagonal and symmetric rule, [C] each."""
    at = rule_weights + (start + token) * 3
    outer = tl.load(at, mask=real, other=0.0).to(ACC)
    diagonal = tl.load(at + 1, mask=real, other=0.0).to(ACC)
    return outer, diagonal, tl.load(at + 2, mask=real, other=0.0).to(ACC)


@triton.jit
def weigh_rules(rho, rule_weights, start, token, real, MIXED: tl.constexpr, ACC: tl.constexpr):
    """Return 1 - ρ, a, b and c, all [C]."""
    write = (1.0 - rho).to(ACC)  # rho is float64: 1 - rho keeps its digits
    a, b, c = write, write, write
    if MIXED:
        outer, diagonal, symmetric = load_rules(rule_weights, start, token, real, ACC)
        b = write * symmetric * 0.5
        a, c = write * outer + b, write * diagonal
    return write, a, b, c


@triton.jit
def compare_tokens(
    x, y, start, token, real, N: tl.constexpr, C: tl.constexpr, W: tl.constexpr, P: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Return x_t . y_i for the tokens t, i of a chunk [C, C]."""
    out = tl.zeros([C, C], dtype=ACC)
    for first in range(0, W, P):
        rows = first + tl.arange(0, P)
        x_w = load_columns(x, start, token, real, rows, N, ACC)
        y_w = load_columns(y, start, token, real, rows, N, ACC)
        out = tl.dot(x_w, tl.trans(y_w), out, input_precision=PRECISION, out_dtype=ACC)
    return out


@triton.jit
def apply_matrix(
    x, matrix, column, TRANSPOSED: tl.constexpr, start, token, real,
    N: tl.constexpr, C: tl.constexpr, W: tl.constexpr, P: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Return columns of x M, or of x M^T, for M [N, N]: [C, P]."""
    out = tl.zeros([C, P], dtype=ACC)
    for first in range(0, W, P):
        rows = first + tl.arange(0, P)
        inside = (rows < N)[:, None] & (column < N)[None, :]
        if TRANSPOSED:
            at = column[None, :] * N + rows[:, None]
        else:
            at = rows[:, None] * N + column[None, :]
        M = tl.load(matrix + at, mask=inside, other=0.0)
        x_w = load_columns(x, start, token, real, rows, N, ACC)
        out = tl.dot(x_w, M, out, input_precision=PRECISION, out_dtype=ACC)
    return out
