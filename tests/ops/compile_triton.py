"""Compile every Triton kernel for GPUs that need not be there; run by ``test_triton_compiles.py``.

A program of its own: in the tests' process Triton interprets.
"""

import sys
from collections.abc import Iterator
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from unimatrix.ops.matrix_state import triton as matrix_state
from unimatrix.ops.selective_slots import triton as selective_slots
from unimatrix.ops.slots import triton as slots

CAPABILITIES = (80, 90)
LARGEST_SHARED_BYTES = 99 * 1024  # of a block, on the GPU of capability 8.0 or later with the least

# Arguments that are not those of the tokens' dtype, by name.
SUMS = [
    "initial",
    "states",
    "final",
    "grads",
    "dfinal",
    "dinitial",
    "dlog_retention",
    "drule_weights",
]
WHOLE = [
    "lengths",
    "initial_ages",
    "chosen",
    "writers",
    "ages",
    "read_keys",
    "write_keys",
    "value_ids",
    "write_codes",
    "first_position",
    "found",
    "found_codes",
    "found_values",
    "final_writers",
]
TYPES = {
    **dict.fromkeys(SUMS, "*fp32"),
    **dict.fromkeys(WHOLE, "*i64"),
    **dict.fromkeys(["T", "H", "num_chunks", "num_tokens", "num_entries"], "i32"),
    **dict.fromkeys(["query_units", "key_units", "offsets", "threshold"], "*fp64"),
    **dict.fromkeys(["entry_filled", "reads", "writes"], "*i1"),
    **dict.fromkeys(["slot_keys", "final_keys"], "*i32"),
    **dict.fromkeys(["slot_values", "final_values"], "*i16"),
    **dict.fromkeys(["slot_codes", "final_codes"], "*i8"),
}
# Triton compiles a kernel anew where a whole number is 1, and then takes it for a constant.
ONES = dict.fromkeys(["T", "H", "num_chunks", "num_tokens", "num_entries"], 1)
READ = {"TO_LOGIT": 1.0, "SCALE": 8.0, "MIN": 1e-12, "POSITIONS": 16}

Launch = tuple[Any, dict[str, Any], str, dict[str, int]]


def list_launches() -> Iterator[Launch]:
    """Yield kernels with their constants, the tokens' dtype and the options they are run with."""
    cases = ((16, False, "fp32", {}), (64, True, "fp32", {}), (128, True, "bf16", {}))
    for n, mixed, dtype, ones in (*cases, (16, True, "fp32", ONES)):
        tiles = matrix_state._choose_tiles(n, 64, narrow=dtype == "bf16")
        forms = {**tiles, "MIXED": mixed, "HAS_LENGTHS": mixed, **ones}
        in_turn = matrix_state._in_turn(tiles["W"])
        yield matrix_state._carry_states, forms, dtype, in_turn
        yield matrix_state._carry_gradients, forms, dtype, in_turn
        yield matrix_state._read_states, forms, dtype, matrix_state._AT_ONCE
        yield matrix_state._write_gradients, forms, dtype, matrix_state._AT_ONCE
    for m, c, ones in ((32, 64, {}), (64, 256, {}), (32, 64, ONES)):
        sizes = {"M": m, "C": c, "K": 4, "D": c, "WIDTH": c, "VALUES": c, "READS": 4, "SLOTS": m}
        sizes |= ones
        yield slots._allocate_row, sizes, "fp32", {"num_warps": slots.choose_warps(m * c)}
        yield slots._read_rows, sizes | READ, "fp32", {"num_warps": 4}
        yield slots._read_backward_rows, sizes | READ, "fp32", {"num_warps": 4}
    for places, bounded in ((32, True), (4096, False)):
        policy = {"M": 32, "Q": 4, "N": 2, "PLACES": places, "BOUNDED": bounded, "MARGIN": 8}
        policy |= {"KEEP_FIRST": bounded, "FADE_TOKENS": 64 * bounded}
        policy |= {"T": 1} if bounded else {}
        policy |= {"NO_KEY": -1, "MIN_CODE": -128, "ABOVE_ALL": 128}
        options = {"num_warps": selective_slots.choose_warps(places)}
        yield selective_slots._scan_row, policy, "fp32", options


def compile_kernel(launch: Launch, capability: int) -> int:
    """Compile a kernel and return the bytes of shared memory that a block of it takes."""
    kernel, constants, dtype, options = launch
    absent = set()
    if not constants.get("MIXED", True):
        absent = {"d", "rule_weights", "dd", "drule_weights"}
    if not constants.get("HAS_LENGTHS", True):
        absent |= {"lengths"}
    types = {}
    for name in kernel.arg_names:
        is_constant = name in constants or name in absent
        types[name] = "constexpr" if is_constant else TYPES.get(name, f"*{dtype}")
    values = {
        (i,): constants.get(name)
        for i, name in enumerate(kernel.arg_names)
        if types[name] == "constexpr"
    }
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if types[name].startswith("*")
    }
    source = ASTSource(kernel, types, constexprs=values, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return compiled.metadata.shared


def main() -> None:
    for launch in list_launches():
        for capability in CAPABILITIES:
            shared = compile_kernel(launch, capability)
            name = f"{launch[0].__name__} for {capability}"
            assert shared <= LARGEST_SHARED_BYTES, f"{name} takes {shared} bytes of shared memory"
            sys.stdout.write(f"{name}: {shared} bytes\n")


if __name__ == "__main__":
    main()
