"""Numbers in vector registers, for kernels whose rows are short and known at compile time.

A row of N numbers is one value, ``Lanes``. Plain loops over elements took six times as long: the
compiler cannot prove that the arrays do not overlap.
"""
# mypy: allow-untyped-defs

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, register_model

# Fused multiply-add and free order of sums; NaN, infinity and division keep their meaning.
_FASTMATH = ("reassoc", "contract", "nsz")
OPTIONS = {"nogil": True, "error_model": "numpy", "fastmath": set(_FASTMATH)}


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
    """Return the address of ``array[offset]``; passing it on counts no reference."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.gep(context.make_array(array)(context, builder, args[0]).data, [args[1]])

    return types.CPointer(array.dtype)(array, types.intp), generate


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
def zeros(_: Any, pointer: Any, width: Any) -> Any:
    """Return ``len(width)`` zeros of the dtype that ``pointer`` points to."""
    lanes = Lanes(pointer.dtype, width.count)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return ir.Constant(context.get_value_type(lanes), None)

    return lanes(pointer, width), generate


def _define_arithmetic(instruction: str) -> Any:
    """Return ``f(lanes, other) -> lanes`` for an LLVM instruction; ``other``: a number or lanes."""

    @intrinsic
    def combine(_: Any, lanes: Any, other: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            second = _spread(builder, args[1], args[0].type)
            return getattr(builder, instruction)(args[0], second, flags=_FASTMATH)

        return lanes(lanes, lanes if isinstance(other, Lanes) else lanes.dtype), generate

    return combine


plus, times = _define_arithmetic("fadd"), _define_arithmetic("fmul")


@intrinsic
def plus_at(_: Any, lanes: Any, index: Any, other: Any) -> Any:
    """Return ``lanes`` with ``other``, or its lane, added in lane ``index`` alone."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        indices = ir.VectorType(ir.IntType(64), lanes.width)
        every = ir.Constant(indices, list(range(lanes.width)))
        here = builder.icmp_signed("==", every, _spread(builder, args[1], indices))
        second = _spread(builder, args[2], args[0].type)
        return builder.select(here, builder.fadd(args[0], second), args[0])

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
