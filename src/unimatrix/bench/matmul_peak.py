"""How many float32 multiply-adds a second this machine does at best: one large matrix product."""

import time

import torch

from unimatrix.bench.arithmetic import FLOPS_PER_MULTIPLY_ADD
from unimatrix.bench.clock import synchronize

# Rows = columns: large enough to pay, small enough for a hundredth of a second on two cores.
_SIZES = {"cpu": 1024, "cuda": 8192, "mps": 4096}
_FIRST_SAMPLES = 12


class MatmulPeak:
    """The best rate of a matrix product seen so far.

    Args:
        device: cpu, cuda or mps; with the threads and the precision that torch has now.
    """

    def __init__(self, device: str) -> None:
        size = _SIZES[device]
        generator = torch.Generator().manual_seed(0)
        self._factor = torch.randn(size, size, generator=generator).to(device)
        self._device = device
        self.flops_per_s = 0.0
        for _ in range(_FIRST_SAMPLES):
            self.sample()

    @torch.no_grad()
    def sample(self) -> None:
        """Time one product more, so that the peak and what it is compared with are of one time."""
        synchronize(self._device)
        start = time.perf_counter()
        self._factor @ self._factor
        synchronize(self._device)
        seconds = time.perf_counter() - start
        flops = FLOPS_PER_MULTIPLY_ADD * self._factor.shape[0] ** 3
        self.flops_per_s = max(self.flops_per_s, flops / seconds)
