"""Ceilings: what a product and a copy are counted as."""

import itertools
from collections.abc import Iterator

import pytest
import torch

from unimatrix.bench import ceilings, clock
from unimatrix.bench.ceilings import Ceilings


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "_SIZES", {"cpu": 32})
    monkeypatch.setattr(ceilings, "_COPIED_BYTES", 1000)


def stop_the_clock(monkeypatch: pytest.MonkeyPatch, *seconds: float) -> None:
    """Let the runs to come take so long, and all after them as long as the last."""

    def read() -> Iterator[float]:
        now = 0.0
        for taken in itertools.chain(seconds, itertools.repeat(seconds[-1])):
            yield now
            now += taken
            yield now

    monkeypatch.setattr(clock.time, "perf_counter", read().__next__)


def test_the_best_of_all_samples_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    stop_the_clock(monkeypatch, 0.5)
    found = Ceilings("cpu", "float32", copies=True)
    assert found.flops_per_s == pytest.approx(2 * 32**3 / 0.5)
    assert found.bytes_per_s == pytest.approx(2 * 1000 / 0.5)
    stop_the_clock(monkeypatch, 0.25, 2.0)
    found.sample()
    assert found.flops_per_s == pytest.approx(2 * 32**3 / 0.25)
    assert found.bytes_per_s == pytest.approx(2 * 1000 / 0.5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_are_of_the_dtype(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()
    matmul = torch.Tensor.__matmul__
    monkeypatch.setattr(
        torch.Tensor, "__matmul__", lambda a, b: (seen.add(a.dtype), matmul(a, b))[1]
    )
    assert Ceilings("cpu", dtype, copies=False).bytes_per_s is None
    assert seen == {getattr(torch, dtype)}
