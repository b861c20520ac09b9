"""Passes over features as torch composes them: the oracle of the fused ones, and any device's."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, silu


def normalize_rows(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Compute E22; arguments as in ``fused_passes.normalize_rows``."""
    return rms_norm(x, x.shape[-1:], weight, eps)


def sum_gated(gates: Tensor, contexts: Sequence[Tensor]) -> Tensor:
    """Compute the gated sum of E11; arguments as in ``fused_passes.sum_gated``."""
    shares = torch.sigmoid(gates).chunk(len(contexts), dim=-1)
    mixed = shares[0] * contexts[0]
    for share, context in zip(shares[1:], contexts[1:], strict=True):
        mixed = torch.addcmul(mixed, share, context)
    return mixed


def apply_gated_unit(gate_and_up: Tensor) -> Tensor:
    """Compute E23; arguments as in ``fused_passes.apply_gated_unit``."""
    gate, up = gate_and_up.chunk(2, dim=-1)
    return silu(gate) * up


def convolve_recent(h: Tensor, weight: Tensor, recent: Tensor) -> Tensor:
    """Compute E19 tap by tap; arguments as in ``fused_passes.convolve_recent``."""
    num_tokens, num_taps = h.shape[1], weight.shape[0]
    stream = torch.cat([recent.to(h.dtype), h], dim=1)  # [B, K - 1 + T, D]
    mixed = h * weight[-1]
    for tap in range(num_taps - 1):
        mixed = torch.addcmul(mixed, stream[:, tap : tap + num_tokens], weight[tap])
    return mixed
