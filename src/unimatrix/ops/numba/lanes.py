"""Numbers in vector registers, for kernels whose rows are short and known at compile time.

A row of N numbers is one value, ``Lanes``. Plain loops over elements took six times as long: the
compiler cannot prove that the arrays do not overlap.
"""
# mypy: allow-untyped-defs

import math
from typing import Any

from llvmlite import ir

from numba import types
from numba.extending import intrinsic, models, register_model

# Fused multiply-add and free order of sums; NaN, infinity and division keep their meaning.
_FASTMATH = ("reassoc", "contract", "nsz")
OPTIONS = {"error_model": "numpy", "fastmath": set(_FASTMATH)}


class Lanes(types.Type):
    """Compile-time type of a few neighbouring numbers held in vector registers."""

    def __init__(self, dtype: types.Type, width: int) -> None:
        self.dtype, self.width = dtype, width
        super().__init__(name=f"Lanes({dtype}, {width})")


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, lanes: Lanes) -> None:
        element = manager.lookup(lanes.dtype).get_value_type()
        super().__init__(manager, lanes, ir.VectorType(element, lanes.width))


def _spread(builder: Any, value: Any, vector: Any) -> Any:
    """Return ``value`` in every lane; a vector is returned as it is."""
    if value.type == vector:
        return value
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.IntType(32)(0))
    everywhere = ir.Constant(ir.VectorType(ir.IntType(32), vector.count), None)
    return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), everywhere)


@intrinsic
def pointer(_: Any, array: Any, offset: Any) -> Any:
    """Return the address of ``array[offset]``; passing it on counts no reference.

    Numba frees an array that the function itself made behind the last mention of its name, even if
    pointers into it are used later: ``keep`` the array behind their last use.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.gep(context.make_array(array)(context, builder, args[0]).data, [args[1]])

    return types.CPointer(array.dtype)(array, types.intp), generate


@intrinsic
def keep(_: Any, array: Any) -> Any:
    """Do nothing but mention the array: until here it lives, and pointers into it are valid."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return context.get_dummy_value()

    return types.void(array), generate


@intrinsic
def at(_: Any, pointer: Any, offset: Any) -> Any:
    """Return the address of ``pointer[offset]``."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.gep(args[0], [args[1]])

    return pointer(pointer, types.intp), generate


@intrinsic
def load(_: Any, pointer: Any, offset: Any, width: Any) -> Any:
    """Return the ``len(width)`` neighbours from ``pointer[offset]`` on."""
    lanes = Lanes(pointer.dtype, width.count)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = context.get_value_type(lanes).as_pointer()
        start = builder.bitcast(builder.gep(args[0], [args[1]]), vector)
        return builder.load(start, align=pointer.dtype.bitwidth // 8)

    return lanes(pointer, types.intp, width), generate


@intrinsic
def store(_: Any, pointer: Any, offset: Any, lanes: Any) -> Any:
    """Write ``lanes`` to ``pointer[offset]`` and its neighbours."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = context.get_value_type(lanes).as_pointer()
        start = builder.bitcast(builder.gep(args[0], [args[1]]), vector)
        builder.store(args[2], start, align=pointer.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(pointer, types.intp, lanes), generate


@intrinsic
def prefetch(_: Any, pointer: Any, offset: Any) -> Any:
    """Bring ``pointer[offset]`` into the caches; it may lie behind the end of the array."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        name = "llvm.prefetch.p0i8"
        fetch = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
        address = builder.bitcast(builder.gep(args[0], [args[1]]), byte)
        # Read, not written; wanted in all caches; data, not instructions.
        builder.call(fetch, [address, number(0), number(3), number(1)])
        return context.get_dummy_value()

    return types.void(pointer, types.intp), generate


@intrinsic
def zeros(_: Any, pointer: Any, width: Any) -> Any:
    """Return ``len(width)`` zeros of the dtype that ``pointer`` points to."""
    lanes = Lanes(pointer.dtype, width.count)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return ir.Constant(context.get_value_type(lanes), None)

    return lanes(pointer, width), generate


def _define_arithmetic(instruction: str) -> Any:
    """Return ``f(lanes, other) -> lanes`` of an LLVM instruction; ``other``: lanes, or a number."""

    @intrinsic
    def combine(_: Any, lanes: Any, other: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            second = _spread(builder, args[1], args[0].type)
            return getattr(builder, instruction)(args[0], second, flags=_FASTMATH)

        return lanes(lanes, lanes if isinstance(other, Lanes) else lanes.dtype), generate

    return combine


plus, times = _define_arithmetic("fadd"), _define_arithmetic("fmul")
minus, over = _define_arithmetic("fsub"), _define_arithmetic("fdiv")


# For each width of a number in bits: terms of the series of e^r on |r| <= ln(2) / 2, bits of the
# mantissa, bias of the exponent, and the largest argument whose exponential is finite.
_EXPONENTIAL = {32: (8, 23, 127, 87.0), 64: (14, 52, 1023, 708.0)}
# ln 2 in two parts, the first of few bits, so that its multiples are exact.
_LN_2 = (0.693359375, -2.12194440054690583e-4)


def _declare_elementwise(builder: Any, name: str, lanes: Lanes, vector: Any) -> Any:
    """Return LLVM's function of each lane of a vector."""
    full_name = f"llvm.{name}.v{lanes.width}f{lanes.dtype.bitwidth}"
    return builder.module.declare_intrinsic(full_name, fnty=ir.FunctionType(vector, [vector]))


@intrinsic
def exponential(_: Any, lanes: Any) -> Any:
    """Return e to the power of each lane, to the last bits; arguments are cut to a finite range.

    e^x = 2^n e^r with n the nearest whole number to x / ln 2; e^r by its series. The order of
    operations is kept where rounding depends on it.
    """
    terms, mantissa, bias, largest = _EXPONENTIAL[lanes.dtype.bitwidth]

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = args[0].type
        integers = ir.VectorType(ir.IntType(lanes.dtype.bitwidth), lanes.width)

        def repeat(value: float, kind: Any = vector) -> Any:
            return ir.Constant(kind, [value] * lanes.width)

        x = args[0]
        x = builder.select(builder.fcmp_ordered(">", x, repeat(largest)), repeat(largest), x)
        x = builder.select(builder.fcmp_ordered("<", x, repeat(-largest)), repeat(-largest), x)
        plus_half = builder.fadd(builder.fmul(x, repeat(1 / math.log(2))), repeat(0.5))
        n = builder.call(_declare_elementwise(builder, "floor", lanes, vector), [plus_half])
        r = builder.fsub(x, builder.fmul(n, repeat(_LN_2[0])))
        r = builder.fsub(r, builder.fmul(n, repeat(_LN_2[1])))
        series = repeat(1 / math.factorial(terms))
        for k in range(terms - 1, -1, -1):
            series = builder.fmul(series, r, flags=("contract",))
            series = builder.fadd(series, repeat(1 / math.factorial(k)), flags=("contract",))
        exponent = builder.add(builder.fptosi(n, integers), repeat(bias, integers))
        power_of_2 = builder.bitcast(builder.shl(exponent, repeat(mantissa, integers)), vector)
        return builder.fmul(series, power_of_2)

    return lanes(lanes), generate


@intrinsic
def root(_: Any, lanes: Any) -> Any:
    """Return the square root of each lane."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.call(_declare_elementwise(builder, "sqrt", lanes, args[0].type), args)

    return lanes(lanes), generate


@intrinsic
def plus_at(_: Any, lanes: Any, index: Any, other: Any) -> Any:
    """Return ``lanes`` with ``other``, a number or lanes, added in lane ``index`` alone."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        integers = ir.VectorType(ir.IntType(64), lanes.width)
        numbers = ir.Constant(integers, list(range(lanes.width)))
        is_chosen = builder.icmp_signed("==", numbers, _spread(builder, args[1], integers))
        second = _spread(builder, args[2], args[0].type)
        return builder.select(is_chosen, builder.fadd(args[0], second), args[0])

    return lanes(lanes, types.int64, other), generate


@intrinsic
def total(_: Any, lanes: Any) -> Any:
    """Return the sum over the lanes."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = args[0].type
        reduce = builder.module.declare_intrinsic(
            f"llvm.vector.reduce.fadd.v{lanes.width}f{lanes.dtype.bitwidth}",
            fnty=ir.FunctionType(vector.element, [vector.element, vector]),
        )
        return builder.call(reduce, [vector.element(-0.0), args[0]], fastmath=_FASTMATH)

    return lanes.dtype(lanes), generate


@intrinsic
def largest(_: Any, lanes: Any) -> Any:
    """Return the largest of the lanes; a NaN is passed over."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = args[0].type
        reduce = builder.module.declare_intrinsic(
            f"llvm.vector.reduce.fmax.v{lanes.width}f{lanes.dtype.bitwidth}",
            fnty=ir.FunctionType(vector.element, [vector]),
        )
        return builder.call(reduce, [args[0]])

    return lanes.dtype(lanes), generate


@intrinsic
def find_first(_: Any, lanes: Any, number: Any) -> Any:
    """Return the index of the first lane that holds ``number``, ``len(lanes)`` if none does."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bits, word = ir.IntType(lanes.width), ir.IntType(64)
        is_equal = builder.fcmp_ordered("==", args[0], _spread(builder, args[1], args[0].type))
        first = builder.cttz(builder.bitcast(is_equal, bits), ir.Constant(ir.IntType(1), 0))
        return first if lanes.width == 64 else builder.zext(first, word)

    return types.int64(lanes, lanes.dtype), generate


@intrinsic
def larger(_: Any, lanes: Any, other: Any) -> Any:
    """Return lane by lane the larger of two numbers."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.select(builder.fcmp_ordered(">", *args), *args)

    return lanes(lanes, lanes), generate


@intrinsic
def where_negative(_: Any, lanes: Any, if_negative: Any, otherwise: Any) -> Any:
    """Return ``if_negative`` in the lanes that are below zero, ``otherwise`` in the others."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        is_below = builder.fcmp_ordered("<", args[0], ir.Constant(args[0].type, None))
        return builder.select(is_below, args[1], args[2])

    return lanes(lanes, lanes, lanes), generate
