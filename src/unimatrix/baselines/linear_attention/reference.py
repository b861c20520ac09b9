"""Gated linear attention and the gated delta rule, token by token.

Letters: B batch, T tokens, H heads, K key width and P payload (value) width of a head. The state is
``[B, H, K, P]``; a token writes first and reads then.
"""

import torch
from torch import Tensor


def scan_gated(
    q: Tensor, k: Tensor, v: Tensor, log_retention: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scan ``S_t = Diag(a_t) S_{t-1} + k_t v_t^T`` and read ``y_t = S_t^T q_t``.

    Source: gated linear attention, arXiv:2312.06635, equation 3.

    Args:
        q: [B, T, H, K], any float.
        k: [B, T, H, K].
        v: [B, T, H, P].
        log_retention: [B, T, H, K], ln a_t, <= 0.
        state: [B, H, K, P] to continue from; ``None`` is zero.

    Returns:
        y [B, T, H, P] and the state after the last token.
    """
    S = _start(k, v) if state is None else state
    reads = []
    for t in range(q.shape[1]):
        S = log_retention[:, t, :, :, None].exp() * S + k[:, t, :, :, None] * v[:, t, :, None]
        reads.append(torch.einsum("bhkp,bhk->bhp", S, q[:, t]))
    return torch.stack(reads, dim=1), S


def scan_gated_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_retention: Tensor,
    beta: Tensor,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scan ``S_t = a_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T``; read ``S_t^T q_t``.

    Source: Gated DeltaNet, arXiv:2412.06464, equation 10.

    Args:
        q: [B, T, H, K], any float.
        k: [B, T, H, K], unit vectors.
        v: [B, T, H, P].
        log_retention: [B, T, H], ln a_t, <= 0.
        beta: [B, T, H], strength of a write, in [0, 1].
        state: [B, H, K, P] to continue from; ``None`` is zero.

    Returns:
        y [B, T, H, P] and the state after the last token.
    """
    S = _start(k, v) if state is None else state
    reads = []
    for t in range(q.shape[1]):
        S = log_retention[:, t, :, None, None].exp() * S
        error = v[:, t] - torch.einsum("bhkp,bhk->bhp", S, k[:, t])
        S = S + (beta[:, t, :, None] * k[:, t])[..., None] * error[:, :, None]
        reads.append(torch.einsum("bhkp,bhk->bhp", S, q[:, t]))
    return torch.stack(reads, dim=1), S


def _start(k: Tensor, v: Tensor) -> Tensor:
    return k.new_zeros(k.shape[0], k.shape[2], k.shape[3], v.shape[3])
