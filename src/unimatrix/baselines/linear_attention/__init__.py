"""Two gated linear attentions: the equation as a loop, a chunked form, and a language model."""

from unimatrix.baselines.linear_attention.chunked import chunk_gated, chunk_gated_delta
from unimatrix.baselines.linear_attention.reference import scan_gated, scan_gated_delta

__all__ = ["chunk_gated", "chunk_gated_delta", "scan_gated", "scan_gated_delta"]
