"""How the next byte is chosen; loads neither torch nor transformers."""

import math
from dataclasses import dataclass

from unimatrix.errors import InputError

DEFAULT_NEW_BYTES = 256
"""How far a prompt is continued where nobody says."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How the next byte is chosen."""

    temperature: float = 0.8
    """Divides the logits; 0 always takes the most likely byte."""
    top_p: float = 1.0
    """Sample from the smallest set of bytes that holds this much probability; 1 is all."""
    top_k: int | None = None
    """Sample from so many most likely bytes only; none is all."""
    seed: int = 0
    """Seed of the draws."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise InputError(
                f"temperature is {self.temperature}; it must be 0 (the most likely byte) or more"
            )
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k is {self.top_k}; it must be at least 1")


DEFAULT_SAMPLING = Sampling()
