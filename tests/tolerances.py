"""The one table of limits: (operator or model, dtype, quantity) -> largest allowed error.

The error of a tensor is max|a - b| / max|b|, absolute where b is 0. The same limits hold on a
laptop and in CI; none is conditional.
"""

import torch

LIMITS: dict[tuple[str, torch.dtype, str], float] = {
    # float64: two orders of summation of the same terms.
    ("matrix_state", torch.float64, "value"): 1e-10,
    ("matrix_state", torch.float64, "grad"): 1e-9,
    ("slots", torch.float64, "value"): 1e-10,
    ("slots", torch.float64, "grad"): 1e-9,
    ("selective_slots", torch.float64, "value"): 1e-10,
    ("selective_slots", torch.float64, "grad"): 1e-9,
    ("dense_memory", torch.float64, "value"): 1e-10,
    ("dense_memory", torch.float64, "grad"): 1e-9,
    ("indexed_attention", torch.float64, "value"): 1e-10,
    ("indexed_attention", torch.float64, "grad"): 1e-9,
    ("fused_passes", torch.float64, "value"): 1e-10,
    ("fused_passes", torch.float64, "grad"): 1e-9,
    ("linear_attention", torch.float64, "value"): 1e-9,
    # float32: accumulated rounding over at most 1,000 tokens.
    ("matrix_state", torch.float32, "value"): 2e-5,
    ("matrix_state", torch.float32, "grad"): 1e-4,
    ("slots", torch.float32, "value"): 2e-5,
    ("slots", torch.float32, "grad"): 1e-4,
    ("selective_slots", torch.float32, "value"): 2e-5,
    ("selective_slots", torch.float32, "grad"): 1e-4,
    ("dense_memory", torch.float32, "value"): 2e-5,
    ("dense_memory", torch.float32, "grad"): 1e-4,
    ("indexed_attention", torch.float32, "value"): 2e-5,
    ("indexed_attention", torch.float32, "grad"): 1e-4,
    ("fused_passes", torch.float32, "value"): 2e-5,
    ("fused_passes", torch.float32, "grad"): 1e-4,
    ("linear_attention", torch.float32, "value"): 2e-5,
    # The whole model against the golden files (the project's bar).
    ("golden", torch.float64, "value"): 1e-9,
    ("golden", torch.float64, "grad"): 1e-9,
    ("golden", torch.float32, "value"): 1e-4,
    ("golden", torch.float32, "grad"): 1e-4,
    # The whole model against itself: other splits, padding, cache.
    ("model", torch.float64, "value"): 1e-10,
    ("model", torch.float32, "value"): 1e-4,
}


def limit(subject: str, dtype: torch.dtype, quantity: str) -> float:
    """Return the largest allowed error."""
    return LIMITS[subject, dtype, quantity]


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return max|a - b| / max|b|, absolute where b is 0; infinite where shapes differ or NaN."""
    if actual.shape != expected.shape:
        return float("inf")
    if expected.numel() == 0:
        return 0.0
    difference = (actual.double() - expected.double()).abs().max().item()
    scale = expected.double().abs().max().item()
    if difference != difference or scale != scale:
        return float("inf")
    return difference / scale if scale > 0 else difference
