"""One token of one head's matrix state, in place: E1 to E4, E18 without a loop over tokens."""

import math
from typing import Any

import numpy as np

from unimatrix.ops.numba.compile import part

Array = np.ndarray[Any, Any]


@part(error_model="numpy", fastmath={"reassoc", "contract", "nsz"})
def _read(S: Array, q: Array, y: Array) -> None:
    """Set y to the readout S^T q."""
    size = S.shape[0]
    for p in range(size):
        y[p] = 0.0
    for a in range(size):
        q_a = q[a]  # read once: for all that the compiler knows, y may overlap with q
        for p in range(size):
            y[p] += q_a * S[a, p]


@part(error_model="numpy", fastmath={"reassoc", "contract", "nsz"})
def advance_matrix(
    S: Array,  # [N, N], address by payload: the transpose of what the cache holds
    q: Array,  # [N]
    k: Array,  # [N]
    v: Array,  # [N]
    d: Array,  # [N], unused without rules
    log_odds: float,  # of the retention
    rules: Array,  # [R] weights of the outer, diagonal and symmetric rule, or empty: outer alone
    norm_guard: bool,
    y: Array,  # [N], written here
) -> None:
    """Write the token into S, then read it."""
    size = S.shape[0]
    kind = S.dtype.type
    # 1 - rho without cancellation is the logistic function of minus the log odds.
    rho = kind(1.0 / (1.0 + math.exp(-log_odds)))
    write = kind(1.0 / (1.0 + math.exp(log_odds)))
    if rules.shape[0] == 0:
        for a in range(size):
            address = write * v[a]
            for p in range(size):
                S[a, p] = rho * S[a, p] + address * k[p]
    else:
        both = kind(0.5) * rules[2]
        for a in range(size):
            address, payload = write * (rules[0] + both) * v[a], write * both * k[a]
            for p in range(size):
                S[a, p] = rho * S[a, p] + address * k[p] + payload * v[p]
            S[a, a] += write * rules[1] * d[a]
    if norm_guard:
        total = kind(0.0)
        for a in range(size):
            for p in range(size):
                total += S[a, p] * S[a, p]
        if total > 1.0:
            scale = kind(1.0 / math.sqrt(total))
            for a in range(size):
                for p in range(size):
                    S[a, p] *= scale
    _read(S, q, y)


@part(error_model="numpy", fastmath={"reassoc", "contract", "nsz"})
def advance_delta(
    S: Array,  # [N, N], address by payload
    q: Array,  # [N]
    k: Array,  # [N]
    v: Array,  # [N]
    log_odds: float,  # of the retention
    strength: float,  # of the write
    y: Array,  # [N], written here
) -> None:
    """Replace what the address held, then read S."""
    size = S.shape[0]
    kind = S.dtype.type
    rho, beta = kind(1.0 / (1.0 + math.exp(-log_odds))), kind(strength)
    for p in range(size):
        y[p] = 0.0  # first what the address holds
    for a in range(size):
        for p in range(size):
            S[a, p] *= rho
            y[p] += v[a] * S[a, p]
    for p in range(size):
        y[p] = beta * (k[p] - y[p])
    for a in range(size):
        for p in range(size):
            S[a, p] += v[a] * y[p]
    _read(S, q, y)
