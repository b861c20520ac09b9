"""The two scans in chunks: matrix products inside a chunk, one short loop over the chunks.

Inside a chunk that starts with state S, and with ``g_t`` the sum of ln a up to and with t:

    S_t = exp(g_t) S + sum over i <= t of exp(g_t - g_i) k_i u_i^T

where u is v (gated linear attention) or solves ``(I + A) U = beta V - beta exp(g) K S`` with
``A_ti = beta_t exp(g_t - g_i) k_t . k_i`` below the diagonal (gated delta rule). Differences are
taken before the exponential, so nothing overflows, however fast a head forgets.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

GATED_CHUNK = 16
"""A chunk of the gated scan holds chunk x chunk x K differences, so it is short."""
DELTA_CHUNK = 32


def chunk_gated(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_retention: Tensor,
    state: Tensor | None = None,
    *,
    chunk: int = GATED_CHUNK,
) -> tuple[Tensor, Tensor]:
    """Compute ``scan_gated`` in chunks.

    Args:
        q, k, v, log_retention, state: as in ``scan_gated``.
        chunk: tokens of a chunk; moves the result by rounding only.

    Cost:
        Time and memory O(T (chunk K + K P)) a head.
    """
    num_tokens = q.shape[1]
    q, k, v, log_retention = (_cut(x, chunk) for x in (q, k, v, log_retention))
    g = log_retention.cumsum(dim=-2)  # [B, H, n, C, K]
    gaps = _mask_future(g.unsqueeze(-2) - g.unsqueeze(-3), chunk, features=True).exp()
    scores = (q.unsqueeze(-2) * k.unsqueeze(-3) * gaps).sum(dim=-1)  # [B, H, n, C, C]
    last = g[..., -1:, :]
    written = (k * (last - g).exp()).mT @ v  # [B, H, n, K, P]
    starts, final = _carry(last.exp().mT, written, state)
    y = scores @ v + (q * g.exp()) @ starts
    return _join(y, num_tokens), final


def chunk_gated_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_retention: Tensor,
    beta: Tensor,
    state: Tensor | None = None,
    *,
    chunk: int = DELTA_CHUNK,
) -> tuple[Tensor, Tensor]:
    """Compute ``scan_gated_delta`` in chunks.

    Args:
        q, k, v, log_retention, beta, state: as in ``scan_gated_delta``.
        chunk: tokens of a chunk; moves the result by rounding only.

    Cost:
        Time and memory O(T (chunk (chunk + K + P) + K P)) a head.
    """
    num_tokens, key_size = q.shape[1], k.shape[-1]
    q, k, v = (_cut(x, chunk) for x in (q, k, v))
    log_retention, beta = (_cut(x.unsqueeze(-1), chunk) for x in (log_retention, beta))
    g = log_retention.cumsum(dim=-2)  # [B, H, n, C, 1]
    gaps = _mask_future(g - g.mT, chunk).exp()  # [B, H, n, C, C]
    below = (beta * gaps * (k @ k.mT)).tril(-1)
    sides = torch.cat([beta * g.exp() * k, beta * v], dim=-1)  # [B, H, n, C, K + P]
    solved = torch.linalg.solve_triangular(
        below + torch.eye(chunk, dtype=k.dtype, device=k.device),
        sides,
        upper=False,
        unitriangular=True,
    )
    from_state, from_values = solved[..., :key_size], solved[..., key_size:]
    scores = gaps * (q @ k.mT)
    q_start, last = q * g.exp(), g[..., -1:, :]
    k_end, retained = k * (last - g).exp(), last.exp()
    S = _start(k, v) if state is None else state
    reads = []
    for n in range(q.shape[2]):
        u = from_values[:, :, n] - from_state[:, :, n] @ S  # [B, H, C, P]
        reads.append(scores[:, :, n] @ u + q_start[:, :, n] @ S)
        S = retained[:, :, n] * S + k_end[:, :, n].mT @ u
    return _join(torch.stack(reads, dim=2), num_tokens), S


def _cut(x: Tensor, chunk: int) -> Tensor:
    """Return [B, T, H, F] as [B, H, n, C, F]; padding zeros neither write nor forget."""
    missing = -x.shape[1] % chunk
    x = pad(x, (0, 0, 0, 0, 0, missing)) if missing else x
    return x.reshape(x.shape[0], -1, chunk, *x.shape[2:]).permute(0, 3, 1, 2, 4)


def _join(y: Tensor, num_tokens: int) -> Tensor:
    """Return [B, H, n, C, P] as [B, T, H, P]."""
    return y.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :num_tokens]


def _mask_future(gaps: Tensor, chunk: int, *, features: bool = False) -> Tensor:
    """Set ``gaps`` [.., C, C] (with ``features`` [.., C, C, K]) to -inf where i > t."""
    future = torch.ones(chunk, chunk, dtype=torch.bool, device=gaps.device).triu(1)
    return gaps.masked_fill(future.unsqueeze(-1) if features else future, -torch.inf)


def _carry(retained: Tensor, written: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the state before each chunk [B, H, n, K, P] and after the last [B, H, K, P].

    Args:
        retained: [B, H, n, K, 1].
        written: [B, H, n, K, P].
        state: before the first chunk; ``None`` is zero.
    """
    S = torch.zeros_like(written[:, :, 0]) if state is None else state
    starts = []
    for n in range(written.shape[2]):
        starts.append(S)
        S = retained[:, :, n] * S + written[:, :, n]
    return torch.stack(starts, dim=2), S


def _start(k: Tensor, v: Tensor) -> Tensor:
    return k.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1])
