"""Calls a compiled kernel from all threads of libgomp without the interpreter.

The threads of a team run a function of machine code. Handed a Python function, each thread first
waits for the interpreter's lock, and a thread that has to wait for a lock sleeps: a kernel of 60
microseconds took 100 on two threads. So the team runs ``_work`` below, which takes one span of rows
after the other and calls the kernel's entry point.

That entry point takes the addresses of two slots, for its result and its exception, and then plain
whole numbers: an array is seven or more of them (``_ARRAY``), a tuple one for each member.
``_work`` reads them from a table and always passes ``_MOST_NUMBERS``: by the calling conventions of
x86-64 and 64-bit Arm a function does not see arguments behind its own. Floats travel in other
registers, so kernels take floats in arrays. ``_require_layout`` compares all of this with what
Numba compiled.
"""
# mypy: allow-untyped-defs

import ctypes
import functools
import platform
from array import array
from collections.abc import Iterable
from typing import Any

from llvmlite import ir
from torch import Tensor

import numba
from numba import types
from numba.core.datamodel import default_manager
from numba.extending import intrinsic
from unimatrix.ops.numba.compile import callback

KNOWS_MACHINE = platform.machine() in ("x86_64", "aarch64")
"""Whether the calling conventions are those above."""

_MOST_NUMBERS = 320
# Fields of the table: the next span, the number of spans, the entry point, how many spans failed.
# Behind them lie the spans' bounds, and behind those the arguments.
_HEAD = 4
# An array as Numba hands it to a function; the last two hold as many numbers as it has axes.
_ARRAY = ("meminfo", "parent", "nitems", "itemsize", "data", "shape", "strides")


class Shaped:
    """A tensor that a kernel sees as an array of its shape, where others are flat."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def to_array(value: Tensor | Shaped) -> Any:
    """Return the array that a kernel sees."""
    if isinstance(value, Shaped):
        return value.tensor.detach().numpy()
    return value.detach().view(-1).numpy()


@intrinsic
def _take(_: Any, counter: Any) -> Any:
    """Return ``counter[0]`` and add 1 to it, in one step for all threads."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", args[0], ir.IntType(64)(1), "seq_cst")

    return types.int64(types.CPointer(types.int64)), generate


@intrinsic
def _enter(_: Any, address: Any, first: Any, last: Any, numbers: Any) -> Any:
    """Call the entry point with two slots, two bounds and all numbers; return its status."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        number, slot = ir.IntType(64), ir.IntType(8).as_pointer()
        kinds = [slot.as_pointer()] * 2 + [number] * (2 + _MOST_NUMBERS)
        entry = builder.inttoptr(args[0], ir.FunctionType(ir.IntType(32), kinds).as_pointer())
        slots = [builder.alloca(slot) for _ in range(2)]
        for address in slots:
            builder.store(ir.Constant(slot, None), address)
        loaded = [builder.load(builder.gep(args[3], [number(i)])) for i in range(_MOST_NUMBERS)]
        return builder.call(entry, [*slots, args[1], args[2], *loaded])

    numbers_type = types.CPointer(types.int64)
    return types.int32(types.int64, types.int64, types.int64, numbers_type), generate


@intrinsic
def _skip(_: Any, numbers: Any, count: Any) -> Any:
    """Return the address of ``numbers[count]``."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.gep(args[0], [args[1]])

    return numbers(numbers, types.int64), generate


@callback("void(CPointer(int64))")
def _work(table):
    """Take spans of rows until none is left."""
    while True:
        span = _take(table)
        if span >= table[1]:
            break
        numbers = _skip(table, _HEAD + table[1] + 1)
        if _enter(table[2], table[_HEAD + span], table[_HEAD + span + 1], numbers) != 0:
            table[3] += 1


@functools.cache
def _compile_work() -> ctypes.c_void_p:
    """Return the address of the machine code of ``_work``."""
    _work.compile()
    return ctypes.c_void_p(_work.address)


def run_in_team(
    libgomp: ctypes.CDLL, kernel: Any, bounds: list[int], args: tuple[Any, ...]
) -> None:
    """Call ``kernel(first, last, *args)`` for every span between two bounds, a thread for each.

    Args:
        libgomp: with ``GOMP_parallel(function, data, num_threads, flags)``.
        kernel: a compiled function.
        bounds: rising row numbers.
        args: as in ``threads.map_rows``.

    Raises:
        RuntimeError: if the kernel raises, or Numba compiled it for other arguments than are passed
            here.
    """
    num_spans = len(bounds) - 1
    numbers: list[int] = [0, num_spans, 0, 0, *bounds]
    num_before = len(numbers)
    kinds = _flatten(args, numbers)
    num_numbers = len(numbers) - num_before
    numbers[2] = _find_entry(kernel, args, kinds, num_numbers)
    table = array("q", numbers)
    table.frombytes(bytes((_MOST_NUMBERS - num_numbers) * table.itemsize))
    libgomp.GOMP_parallel(_compile_work(), table.buffer_info()[0], num_spans, 0)
    if table[3]:
        raise RuntimeError(f"{kernel.__name__} failed in {table[3]} of {num_spans} spans")


def _flatten(values: Iterable[Any], numbers: list[int]) -> list[Any]:
    """Append what the values are as arguments of machine code; return what tells their types."""
    kinds: list[Any] = []
    for value in values:
        if isinstance(value, Tensor):
            size, step = value.numel(), value.itemsize
            numbers += (0, 0, size, step, value.data_ptr(), size, step)
            kinds.append(value.dtype)
        elif isinstance(value, int):
            numbers.append(value)
            kinds.append(type(value))
        elif isinstance(value, tuple):
            numbers += _flatten_tuple(value)
            kinds += (type(value), value)  # there are few, and comparing them is quick
        else:
            assert isinstance(value, Shaped), "a kernel takes floats and arrays in tensors"
            tensor, step = value.tensor, value.tensor.itemsize
            shape, strides = tensor.shape, tensor.stride()
            numbers += (0, 0, tensor.numel(), step, tensor.data_ptr(), *shape)
            numbers += [step * stride for stride in strides]
            kinds.append((tensor.dtype, len(shape), tensor.is_contiguous()))
    return kinds


@functools.lru_cache(maxsize=256)
def _flatten_tuple(values: tuple[Any, ...]) -> list[int]:
    """Return the numbers of a nested tuple."""
    numbers: list[int] = []
    _flatten(values, numbers)
    return numbers


_entries: dict[tuple[Any, ...], int] = {}


def _find_entry(kernel: Any, args: tuple[Any, ...], kinds: list[Any], num_numbers: int) -> int:
    """Return the address of the kernel compiled for such arguments, which are so many numbers."""
    key = (kernel, *kinds)
    if key not in _entries:
        arrays = (to_array(x) if isinstance(x, Tensor | Shaped) else x for x in args)
        signature = (types.int64, types.int64, *map(numba.typeof, arrays))
        kernel.compile(signature)
        compiled = kernel.overloads[signature]
        _require_layout(kernel, compiled.fndesc, num_numbers)
        _entries[key] = compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name)
    return _entries[key]


def _require_layout(kernel: Any, compiled: Any, num_numbers: int) -> None:
    """Raise ``RuntimeError`` unless the entry point takes two slots, two bounds and the numbers."""
    for kind in compiled.argtypes:
        if isinstance(kind, types.Array) and default_manager.lookup(kind)._fields != _ARRAY:
            raise RuntimeError("Numba lays an array out in another way than is known here")
    entry = kernel.targetctx.call_conv.get_function_type(compiled.restype, compiled.argtypes)
    are_whole = all(isinstance(kind, ir.PointerType | ir.IntType) for kind in entry.args)
    num_compiled = len(entry.args) - 4
    if not are_whole or num_compiled != num_numbers or num_numbers > _MOST_NUMBERS:
        raise RuntimeError(
            f"Numba compiled {kernel.__name__} for {num_compiled} numbers, and {num_numbers} of at "
            f"most {_MOST_NUMBERS} whole ones are passed"
        )
