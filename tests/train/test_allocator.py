"""Freed memory stays in the process where glibc can be told to keep it."""

import ctypes
import platform
import subprocess
import sys

import pytest

from unimatrix.train import allocator

on_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")

# Pages that the system had to bring when 64 MB were asked for, filled and freed once more.
_COUNT_FAULTS = """
import ctypes, resource, sys
from unimatrix.train.allocator import give_freed_memory_back, keep_freed_memory
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
if sys.argv[1] == "keep":
    assert keep_freed_memory()
if sys.argv[1] == "give":
    assert keep_freed_memory() and give_freed_memory_back()
def take():
    place = libc.malloc(2**26)
    ctypes.memset(place, 1, 2**26)
    libc.free(place)
take()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
take()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def count_faults(mode: str) -> int:
    command = [sys.executable, "-c", _COUNT_FAULTS, mode]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@on_glibc
def test_memory_that_was_freed_is_used_again() -> None:
    given_back = count_faults("default")
    assert given_back >= 16  # in huge pages; 16,384 in small ones
    assert count_faults("keep") < given_back / 4
    assert count_faults("give") >= 16


@on_glibc
def test_telling_twice_is_as_good_as_once() -> None:
    code = (
        "from unimatrix.train.allocator import keep_freed_memory as k, give_freed_memory_back as g;"
        "assert k() is k() is g() is g() is True"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("error", [OSError, TypeError, AttributeError])
def test_elsewhere_nothing_is_done(monkeypatch: pytest.MonkeyPatch, error) -> None:
    def refuse(name: object) -> None:
        raise error("no library of the process")

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    monkeypatch.setattr(allocator, "_find_mallopt", allocator._find_mallopt.__wrapped__)
    assert allocator.keep_freed_memory() is False
    assert allocator.give_freed_memory_back() is False
