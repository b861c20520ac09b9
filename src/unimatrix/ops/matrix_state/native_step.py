"""One token of one head's matrix state, in place: E1 to E4, E18 without a loop over tokens."""

import math
from typing import Any

import numpy as np

from unimatrix.ops.numba.compile import part
from unimatrix.ops.numba.lanes import load, plus, store, times, zeros

Array = np.ndarray[Any, Any]
_LANES = (0,) * 8


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
    size: int,  # N
    S: Any,  # pointer to [N, N], address by payload: the transpose of what the cache holds
    q: Any,  # pointer to [N], like the next three
    k: Any,
    v: Any,
    d: Any,  # unused without rules
    rho: Any,  # the retention
    write: Any,  # 1 - rho
    rules: Any,  # pointer to the weights of the outer, diagonal and symmetric rule
    mixes_rules: bool,  # otherwise the outer rule alone
    norm_guard: bool,
    y: Any,  # pointer to [N], written here
) -> None:
    """Write the token into S, then read it.

    Pointers: to count references to slices of arrays took five times as long as the work.
    """
    by_address, by_payload, by_diagonal = write, write * 0, write * 0
    if mixes_rules:
        by_payload = write * rules[2] / 2  # what v k^T is multiplied with
        by_address, by_diagonal = write * rules[0] + by_payload, write * rules[1]
    whole = size - size % len(_LANES)
    for p in range(0, whole, len(_LANES)):
        k_p, v_p = load(k, p, _LANES), load(v, p, _LANES)
        for a in range(size):
            held = times(load(S, a * size + p, _LANES), rho)
            held = plus(held, times(k_p, by_address * v[a]))
            store(S, a * size + p, plus(held, times(v_p, by_payload * k[a])))
    for a in range(size):
        for p in range(whole, size):
            added = by_address * v[a] * k[p] + by_payload * k[a] * v[p]
            S[a * size + p] = rho * S[a * size + p] + added
    if mixes_rules:
        for a in range(size):
            S[a * size + a] += by_diagonal * d[a]
    if norm_guard:
        _guard(size, S)
    _read_state(size, S, q, y)


@part(error_model="numpy", fastmath={"reassoc", "contract", "nsz"})
def _read_state(size: int, S: Any, q: Any, y: Any) -> None:
    """Set y to the readout S^T q; pointers, as in ``advance_matrix``."""
    whole = size - size % len(_LANES)
    for p in range(0, whole, len(_LANES)):
        sums = zeros(y, _LANES)
        for a in range(size):
            sums = plus(sums, times(load(S, a * size + p, _LANES), q[a]))
        store(y, p, sums)
    for p in range(whole, size):
        y[p] = S[p] * q[0]
        for a in range(1, size):
            y[p] += S[a * size + p] * q[a]


@part(error_model="numpy", fastmath={"reassoc", "contract", "nsz"})
def _guard(size: int, S: Any) -> None:
    """Divide S by its norm where that is above 1 (E3)."""
    total = 0.0
    for i in range(size * size):
        total += S[i] * S[i]
    if total > 1.0:
        scale = 1.0 / math.sqrt(total)
        for i in range(size * size):
            S[i] *= scale


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
