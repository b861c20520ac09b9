"""One run in a process of its own: bytes, failures, limits."""

import sys
from dataclasses import replace

import pytest

from unimatrix.bench import process_bytes
from unimatrix.bench.models import BenchModel
from unimatrix.bench.probe import BenchCell, Setting, probe
from unimatrix.bench.process_bytes import is_out_of_bytes, measure_peak_bytes

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8}
SETTING = Setting(text=b"a stone, " * 2000, seed=0, device="cpu", num_threads=1, budget_s=60.0)
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="peak bytes are read from Linux")


def make_cell(mode: str, num_tokens: int, **overrides) -> BenchCell:
    model = BenchModel(name="core", overrides=SMALL | overrides)
    return BenchCell(mode=mode, model=model, num_tokens=num_tokens, batch_size=1)


@LINUX
def test_peak_bytes_are_those_of_the_work_alone() -> None:
    size = 64 * 2**20
    peak_bytes, seconds = measure_peak_bytes(lambda: bytearray(size).count(1), "cpu")
    assert peak_bytes is not None
    # Linux counts resident pages per processor and sums them up now and then.
    assert 0.9 * size < peak_bytes < 1.25 * size
    # What an earlier peak was does not matter.
    later, _ = measure_peak_bytes(lambda: bytearray(size // 4).count(1), "cpu")
    assert later is not None
    assert later < size // 2
    assert seconds >= 0


def test_a_run_in_a_process_of_its_own() -> None:
    found = probe(make_cell("train", 600), SETTING)
    assert found.failure is None
    assert found.state_bytes == 2 * 2 * 8 * 8 * 4 + 3 * 8  # two counters, and the hash
    assert found.run_s > 0
    if sys.platform == "linux":
        assert found.peak_bytes is not None
        assert found.peak_bytes > 600 * 16 * 4


def test_a_compiled_step_in_a_process_of_its_own() -> None:
    cell = make_cell("train", 40)
    model = BenchModel(name="core", overrides=SMALL, compiler="aot_eager")
    found = probe(replace(cell, model=model), SETTING)
    assert found.failure is None
    assert 0 < found.run_s < SETTING.budget_s
    assert found.state_bytes == 2 * 2 * 8 * 8 * 4 + 3 * 8


def test_a_model_that_fails_says_why() -> None:
    # Four tokens more than the table has are only found out in the process.
    found = probe(make_cell("forward", 20, max_position_embeddings=16), SETTING)
    assert found.failure is not None
    assert "position table" in found.failure


def test_time_runs_out() -> None:
    slow = Setting(text=SETTING.text, seed=0, device="cpu", num_threads=1, budget_s=1e-4)
    found = probe(make_cell("decode", 9000), slow)
    assert found.failure is not None
    assert found.failure.startswith("reading the prompt took longer than")


def test_bytes_run_out() -> None:
    assert is_out_of_bytes(MemoryError())
    assert is_out_of_bytes(RuntimeError("DefaultCPUAllocator: can't allocate memory: you"))
    assert not is_out_of_bytes(RuntimeError("shapes differ"))
    available = process_bytes._read_bytes(process_bytes._MACHINE, "MemAvailable")
    assert available > 0 or sys.platform != "linux"
