"""What this machine does at best: arithmetic of a large matrix product, bytes of a large copy."""

from collections.abc import Callable

import torch
from torch import Tensor

from unimatrix.bench.arithmetic import FLOPS_PER_MULTIPLY_ADD
from unimatrix.bench.clock import time_call
from unimatrix.bench.models import DTYPES

# Rows = columns: large enough to pay, small enough for a hundredth of a second on two cores.
_SIZES = {"cpu": 1024, "cuda": 8192, "mps": 4096}
_COPIED_BYTES = 2**29
_FIRST_SAMPLES = 12


class Ceilings:
    """The best rates seen so far, with the threads and the precision that torch has now.

    Args:
        device: cpu, cuda or mps.
        precision: a key of ``DTYPES``, of the factors of a product.
        copies: also time copies; on a CPU they would take from its caches what is timed next.

    Attributes:
        flops_per_s: of the product.
        bytes_per_s: read and written by the copy; ``None`` if it is not timed.
    """

    def __init__(self, device: str, precision: str, *, copies: bool) -> None:
        size = _SIZES[device]
        generator = torch.Generator().manual_seed(0)
        factor = torch.randn(size, size, generator=generator).to(device, DTYPES[precision])
        self._device, self._multiply = device, lambda: factor @ factor
        self._copy: Callable[[], Tensor] | None = None
        if copies:
            source = torch.zeros(_COPIED_BYTES, dtype=torch.uint8, device=device)
            target = torch.empty_like(source)
            self._copy = lambda: target.copy_(source)
        self._flops = FLOPS_PER_MULTIPLY_ADD * size**3
        self.flops_per_s, self.bytes_per_s = 0.0, 0.0 if copies else None
        for _ in range(_FIRST_SAMPLES):
            self.sample()

    @torch.no_grad()
    def sample(self) -> None:
        """Time both once more, beside what their best rates are compared with."""
        seconds = time_call(self._multiply, self._device)
        self.flops_per_s = max(self.flops_per_s, self._flops / seconds)
        if self._copy is not None and self.bytes_per_s is not None:
            # Each byte is read once and written once.
            seconds = time_call(self._copy, self._device)
            self.bytes_per_s = max(self.bytes_per_s, 2 * _COPIED_BYTES / seconds)
