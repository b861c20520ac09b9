"""Matrix state in chunks: matrix products inside a chunk, one state between chunks.

Unrolling the recurrence gives y_t = sum over i <= t of exp(Λ_t - Λ_i) (1 - rho_i) U_i q_t, with Λ
the cumulative sum of log retention. Inside a chunk that is a masked [C, C] product, C the tokens
of a chunk. What came before a chunk enters through the [N, N] state at its start, and those
states obey the same recurrence over chunks, so they are found the same way, in groups of chunks.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from unimatrix.ops.matrix_state.reference import TokenInputs

# Chunks in a group: the recurrence over chunks costs this many multiply-adds a state element.
_GROUP_SIZE = 16


def accumulate_retention(log_retention: Tensor) -> tuple[Tensor, Tensor]:
    """Return what is retained of earlier content, for [..., C] neighbours.

    Returns:
        ``retained`` [..., C]: exp(Λ_t), of what was there at the start; ``between`` [..., C, C]:
        exp(Λ_t - Λ_i) for i <= t, else 0.
    """
    # Past tokens that forget nearly all, small differences of large sums matter: the sum is taken
    # in float64 (where the device has it) and split in two, so that no [C, C] tensor has to be.
    wide = torch.float32 if log_retention.device.type == "mps" else torch.float64
    total = log_retention.to(wide).cumsum(-1)
    high = total.to(log_retention.dtype)
    low = (total - high).detach().to(log_retention.dtype)
    size = total.shape[-1]
    only_earlier = high.new_full((size, size), -torch.inf).triu_(1)
    difference = high[..., :, None] - high[..., None, :]
    difference += (low[..., :, None] - low[..., None, :]).add_(only_earlier)
    return high.exp(), difference.exp_()  # [..., C], [..., C, C]


def fold_tokens(x: Tensor, size: int) -> Tensor:
    """Split dimension 2 of ``x`` into [groups, size], with zeros appended to fill the last."""
    missing = -x.shape[2] % size
    if missing:
        x = pad(x, (0, 0) * (x.dim() - 3) + (0, missing))
    return x.reshape(*x.shape[:2], -1, size, *x.shape[3:])


def _carry(update: Tensor, log_retention: Tensor, initial: Tensor) -> tuple[Tensor, Tensor]:
    """Solve S_m = exp(log_retention_m) S_{m-1} + update_m over M chunks.

    Args:
        update: [B, H, M, N * N].
        log_retention: [B, H, M].
        initial: [B, H, N * N], the S before the first.

    Returns:
        The S before each chunk [B, H, M, N * N], and the last S [B, H, N * N].
    """
    M = update.shape[2]
    if M == 1:
        return initial[:, :, None], log_retention.exp() * initial + update[:, :, 0]
    size = -(-M // -(-M // _GROUP_SIZE))
    folded, folded_log = fold_tokens(update, size), fold_tokens(log_retention, size)
    retained, between = accumulate_retention(folded_log)  # [B, H, G, size], [B, H, G, size, size]
    inside = between @ folded  # [B, H, G, size, N * N]
    before, _ = _carry(inside[:, :, :, -1], folded_log.sum(-1), initial)  # [B, H, G, N * N]
    after = inside + retained[..., None] * before[:, :, :, None]
    after = after.flatten(2, 3)[:, :, :M]  # [B, H, M, N * N]
    return torch.cat((initial[:, :, None], after[:, :, :-1]), dim=2), after[:, :, -1]


def scan_parallel(
    tokens: TokenInputs, *, initial_state: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """Compute E1, E2 and E4 by chunks; arguments as in ``scan_matrix_state``.

    Padded positions must hold zeros: they write nothing, retain everything and read zero.
    """
    q, k, v, d, log_retention, rule_weights, _ = tokens
    T, N = q.shape[1], q.shape[3]
    size = -(-T // -(-T // chunk_size))
    # Retention 0 may come as -inf; exp(-1000) is 0 as well, and can be subtracted from itself.
    log_retention = log_retention.clamp(min=-1000.0)
    write = -torch.expm1(log_retention)[..., None]
    q, k, v, write, log_retention = (
        fold_tokens(x.transpose(1, 2), size) for x in (q, k, v, write, log_retention)
    )  # q, k, v [B, H, M, C, N], write [B, H, M, C, 1], log_retention [B, H, M, C]
    retained, between = accumulate_retention(log_retention)
    to_end = between[..., -1, :, None]  # [B, H, M, C, 1]
    payload = write * k
    if rule_weights is not None and d is not None:
        pi = fold_tokens(rule_weights.transpose(1, 2), size)  # [B, H, M, C, R]
        swapped = write * pi[..., 2:] / 2
        payload = payload * pi[..., :1] + swapped * k
        swapped_payload = swapped * v
        corner = write * pi[..., 1:2] * fold_tokens(d.transpose(1, 2), size)
    y = (q @ v.mT * between) @ payload  # [B, H, M, C, N]
    update = (to_end * payload).mT @ v  # [B, H, M, N, N]
    if rule_weights is not None:
        y = y + (q @ k.mT * between) @ swapped_payload + q * (between @ corner)
        update = update + (to_end * swapped_payload).mT @ k
        update = update + torch.diag_embed((to_end * corner).sum(-2))
    before, final = _carry(update.flatten(3), log_retention.sum(-1), initial_state.flatten(2))
    y = y + retained[..., None] * (q @ before.view(*before.shape[:3], N, N).mT)
    return y.flatten(2, 3)[:, :, :T].transpose(1, 2), final.view(initial_state.shape)
