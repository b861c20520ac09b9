"""Matrix state, straight from the equations: the oracle of the other back ends.

``v`` is the address and ``k`` the payload: S is ``[payload, address]``, a write adds k v^T and the
readout S q returns the payloads whose addresses resemble q. A token is written before it is read.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

READOUT_EPS = 1e-6
"""Small beside the mean square of a readout, which a long retention makes small."""


class TokenInputs(NamedTuple):
    """What the tokens bring; arguments of ``scan_matrix_state``, in the dtype of the state."""

    q: Tensor
    k: Tensor
    v: Tensor
    d: Tensor | None
    log_retention: Tensor
    rule_weights: Tensor | None
    write_strength: Tensor | None = None

    def replace_each(self, change: Callable[[Tensor], Tensor]) -> "TokenInputs":
        """Return the inputs with ``change`` applied to all but ``None``."""
        changed = (None if tensor is None else change(tensor) for tensor in self)
        return TokenInputs(*changed)  # type: ignore[arg-type]  # only what may be None stays so


def scan_reference(
    tokens: TokenInputs, *, initial_state: Tensor, lengths: Tensor | None, norm_guard: bool
) -> tuple[Tensor, Tensor]:
    """Compute the matrix state token by token; arguments as in ``scan_matrix_state``.

    Equation: E1 (write rules and their mixing), E2 (retention), E18 (delta rule), E3 (norm guard),
    E4 (readout).
    """
    q, k, v, d, log_retention, rule_weights, write_strength = tokens
    S, readouts = initial_state, []
    rho = log_retention.exp()  # [B, T, H]
    write = -torch.expm1(log_retention) if write_strength is None else write_strength  # [B, T, H]
    for t in range(q.shape[1]):
        retained = rho[:, t, :, None, None] * S  # [B, H, N, N]
        U = k[:, t, :, :, None] * v[:, t, :, None, :]
        if write_strength is not None:
            held = retained @ v[:, t, :, :, None]  # [B, H, N, 1]
            U = U - held * v[:, t, :, None, :]
        elif rule_weights is not None and d is not None:
            pi = rule_weights[:, t, :, :, None, None]  # [B, H, R, 1, 1]
            symmetric = (U + U.mT) / 2
            U = pi[:, :, 0] * U + pi[:, :, 1] * torch.diag_embed(d[:, t]) + pi[:, :, 2] * symmetric
        S_t = retained + write[:, t, :, None, None] * U
        if norm_guard:
            norm = torch.linalg.vector_norm(S_t, dim=(-2, -1), keepdim=True)
            S_t = S_t / torch.where(norm > 1, norm, 1.0)
        y_t = (S_t @ q[:, t, :, :, None]).squeeze(-1)  # [B, H, N]
        if lengths is not None:
            real = (t < lengths)[:, None, None]
            S_t, y_t = torch.where(real[..., None], S_t, S), torch.where(real, y_t, 0.0)
        S = S_t
        readouts.append(y_t)
    return torch.stack(readouts, dim=1), S
