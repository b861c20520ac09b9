"""The delta rule in chunks: a triangular solve inside a chunk, one state between chunks.

Token t adds the payload u_t = beta_t (k_t - exp(Λ_t) S v_t - sum over i < t of exp(Λ_t - Λ_i)
(v_i . v_t) u_i), with S the state at the chunk's start and Λ the cumulative sum of log retention.
For all tokens of a chunk that is one triangular system, whose solution is linear in S.

Source: Yang et al., "Gated Delta Networks" (arXiv:2412.06464), with the roles of k and v exchanged.
"""

import torch
from torch import Tensor

from unimatrix.ops.matrix_state.parallel import accumulate_retention, fold_tokens
from unimatrix.ops.matrix_state.reference import TokenInputs


def scan_delta_parallel(
    tokens: TokenInputs, *, initial_state: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """Compute E18 and E4 by chunks; arguments as in ``scan_matrix_state``.

    Padded positions must hold zeros: they write nothing, retain everything and read zero.
    """
    q, k, v, _, log_retention, _, write_strength = tokens
    assert write_strength is not None
    T, N = q.shape[1], q.shape[3]
    size = -(-T // -(-T // chunk_size))
    log_retention = log_retention.clamp(min=-1000.0)  # -inf cannot be subtracted from itself
    q, k, v, beta, log_retention = (
        fold_tokens(x.transpose(1, 2), size)
        for x in (q, k, v, write_strength[..., None], log_retention)
    )  # q, k, v [B, H, M, C, N], beta [B, H, M, C, 1], log_retention [B, H, M, C]
    retained, between = accumulate_retention(log_retention)  # [B, H, M, C], [B, H, M, C, C]
    retained = retained[..., None]
    system = (beta * (v @ v.mT) * between).tril(-1)  # the unit diagonal is not read
    right_side = torch.cat([beta * k, beta * retained * v], dim=-1)
    solved = torch.linalg.solve_triangular(system, right_side, upper=False, unitriangular=True)
    payload, erased = solved.split(N, dim=-1)  # u = payload - erased S^T
    weights = q @ v.mT * between  # [B, H, M, C, C]
    address = between[..., -1, :, None] * v  # [B, H, M, C, N]
    S, readouts = initial_state, []
    for m in range(q.shape[2]):
        u = payload[:, :, m] - erased[:, :, m] @ S.mT  # [B, H, C, N]
        before = retained[:, :, m] * (q[:, :, m] @ S.mT)
        readouts.append(before + weights[:, :, m] @ u)
        S = retained[:, :, m, -1:] * S + u.mT @ address[:, :, m]
    y = torch.cat(readouts, dim=2)[:, :, :T]
    return y.transpose(1, 2), S
