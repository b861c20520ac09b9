"""Kernels cover every row once, on torch's threads, on the pool and in a forked child."""

import multiprocessing
import sys
from collections.abc import Iterator

import numba
import numpy as np
import pytest
import torch

from unimatrix.ops.numba import threads, torch_threads


@pytest.fixture(params=["libgomp", "pool"])
def team(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Run with four threads of one kind."""
    if request.param == "pool":
        for module in (threads, torch_threads):
            monkeypatch.setattr(module, "find_libgomp", lambda: None)
    elif torch_threads.find_libgomp() is None:
        pytest.skip("torch has no libgomp on this platform")
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield request.param
    torch.set_num_threads(before)


@numba.njit(nogil=True)
def _count_up(first_row: int, last_row: int, counts: np.ndarray, add: int) -> None:
    counts[first_row:last_row] += add


@numba.njit(nogil=True)
def _refuse(first_row: int, last_row: int) -> None:
    if last_row == 7:
        raise ValueError("the last rows")


@numba.njit(nogil=True)
def _fill_table(
    first_row: int,
    last_row: int,
    form: tuple[tuple[int, int], int],
    flat: np.ndarray,
    table: np.ndarray,
    is_doubled: bool,
) -> None:
    for row in range(first_row, last_row):
        for column in range(table.shape[1]):
            value = flat[row] + form[0][0] * column + form[0][1] + form[1]
            table[row, column] = 2 * value if is_doubled else value


@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 5, 7, 100])
def test_every_row_is_covered_once(team: str, num_rows: int) -> None:
    counts = torch.zeros(num_rows, dtype=torch.int64)
    for add in range(1, 51):
        threads.map_rows(_count_up, num_rows, counts, add)
    assert (counts == 50 * 51 // 2).all()


def test_an_error_in_a_thread_reaches_the_caller(team: str) -> None:
    failure = {"pool": (ValueError, "the last rows"), "libgomp": (RuntimeError, "1 of 4 spans")}
    kind, message = failure[team]
    with pytest.raises(kind, match=message):
        threads.map_rows(_refuse, 7)


@pytest.mark.parametrize("is_doubled", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_arguments_of_every_kind(team: str, is_doubled: bool, stride: int) -> None:
    flat = torch.arange(9.0).view(3, 3)
    table = torch.zeros(9, 5 * stride, dtype=torch.float64)[:, ::stride]
    threads.map_rows(_fill_table, 9, ((10, 7), 100), flat, threads.Shaped(table), is_doubled)
    expected = torch.arange(9.0)[:, None] + 10 * torch.arange(5.0) + 107
    assert (table == expected * (2 if is_doubled else 1)).all()


def _count_in_child(results: multiprocessing.Queue) -> None:
    torch.set_num_threads(2)
    counts = torch.zeros(10, dtype=torch.int64)
    threads.map_rows(_count_up, 10, counts, 3)
    results.put(counts.tolist())


@pytest.mark.skipif(sys.platform == "win32", reason="no fork on Windows")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_has_threads_of_its_own(team: str) -> None:
    threads.map_rows(_count_up, 10, torch.zeros(10, dtype=torch.int64), 1)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    child = context.Process(target=_count_in_child, args=(results,))
    child.start()
    assert results.get(timeout=60) == [3] * 10
    child.join(timeout=60)
    assert child.exitcode == 0


# Made here, because converting 1e-40 to a float32 also goes by the mode of the thread.
_DENORMALS = torch.full((2**20,), 1e-40)


def _halve_denormals() -> torch.Tensor:
    """Return the bits of half of many small numbers, an operator that every thread has part in.

    Bits, because a thread that takes such numbers for zero would also compare them so.
    """
    return (_DENORMALS * 0.5).view(torch.int32)


def test_denormals_are_zero_in_every_thread_while_the_context_lasts(team: str) -> None:
    assert _halve_denormals().all()
    with torch_threads.flush_denormals():
        inside = _halve_denormals()
    after = _halve_denormals()
    # Without libgomp only this thread can be told, and it has the first part.
    flushed = inside if team == "libgomp" else inside[:1000]
    assert not flushed.any()
    assert after.all()


def test_denormals_come_back_after_an_error(team: str) -> None:
    with pytest.raises(RuntimeError, match="midway"), torch_threads.flush_denormals():
        raise RuntimeError("midway")
    assert _halve_denormals().all()


def test_denormals_on_one_thread() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch_threads.flush_denormals():
            assert not _halve_denormals().any()
        assert _halve_denormals().all()
    finally:
        torch.set_num_threads(before)
