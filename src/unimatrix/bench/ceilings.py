"""What this machine does at best: arithmetic of a large matrix product, bytes of a large copy."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from unimatrix.bench.arithmetic import FLOPS_PER_MULTIPLY_ADD
from unimatrix.bench.clock import synchronize
from unimatrix.bench.models import DTYPES

# Rows = columns: large enough to pay, small enough for a hundredth of a second on two cores.
_SIZES = {"cpu": 1024, "cuda": 8192, "mps": 4096}
_COPIED_BYTES = 2**29
_FIRST_SAMPLES = 12


class _Peak:
    """The best rate seen so far of something done again and again.

    Args:
        device: cpu, cuda or mps.
        work: what is done.
        amount: how much of what is counted one time of it is.
    """

    def __init__(self, device: str, work: Callable[[], Tensor], amount: int) -> None:
        self._device, self._work, self._amount = device, work, amount
        self.per_s = 0.0
        for _ in range(_FIRST_SAMPLES):
            self.sample()

    @torch.no_grad()
    def sample(self) -> None:
        """Do it once more, so that the peak and what it is compared with are of one time."""
        synchronize(self._device)
        start = time.perf_counter()
        self._work()
        synchronize(self._device)
        self.per_s = max(self.per_s, self._amount / (time.perf_counter() - start))


class Ceilings:
    """The peaks of a device, with the threads and the precision that torch has now.

    Args:
        device: cpu, cuda or mps.
        precision: a key of ``DTYPES``, of the factors of a product.
        copies: also time copies; on a CPU they would take from its caches what is timed next.
    """

    def __init__(self, device: str, precision: str, *, copies: bool) -> None:
        size = _SIZES[device]
        generator = torch.Generator().manual_seed(0)
        factor = torch.randn(size, size, generator=generator).to(device, DTYPES[precision])
        flops = FLOPS_PER_MULTIPLY_ADD * size**3
        self._matmul = _Peak(device, lambda: factor @ factor, flops)
        self._copy = None
        if copies:
            source = torch.zeros(_COPIED_BYTES, dtype=torch.uint8, device=device)
            target = torch.empty_like(source)
            # Each is read once and written once.
            self._copy = _Peak(device, lambda: target.copy_(source), 2 * _COPIED_BYTES)

    @property
    def flops_per_s(self) -> float:
        """Of the product."""
        return self._matmul.per_s

    @property
    def bytes_per_s(self) -> float | None:
        """Read and written by the copy; ``None`` if it is not timed."""
        return None if self._copy is None else self._copy.per_s

    def sample(self) -> None:
        """Time everything once more."""
        self._matmul.sample()
        if self._copy is not None:
            self._copy.sample()
