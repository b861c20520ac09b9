"""How loops are compiled: kernels that Python calls, and parts that only kernels call.

A kernel is compiled once for its types and kept on disk (``cache``). The wrappers that let Python
call a function cost as much to compile as a small function. So a part has none of them, must not
be called from Python, and has no file: it is compiled into the kernels that call it.
"""
# mypy: allow-untyped-defs

from typing import Any

from llvmlite import binding as llvm

import numba
from numba.core.ccallback import CFunc
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler
from numba.core.compiler_machinery import LoweringPass, register_pass
from numba.core.sigutils import normalize_signature
from numba.core.typed_passes import NativeLowering
from unimatrix.ops.numba.cache import KernelCache


def kernel(**options: Any) -> Any:
    """Return ``numba.njit`` for a function that Python or ``threads.map_rows`` calls."""

    def decorate(function: Any) -> Any:
        compiled = numba.njit(nogil=True, pipeline_class=_KernelCompiler, **options)(function)
        # Set where `cache=True` sets Numba's own, which looks at the file of the kernel alone.
        compiled._cache = KernelCache(function)
        return compiled

    return decorate


def part(**options: Any) -> Any:
    """Return ``numba.njit`` for a function that kernels and other parts alone call."""
    return numba.njit(nogil=True, no_cpython_wrapper=True, no_cfunc_wrapper=True, **options)


def callback(signature: str) -> Any:
    """Return the decorator of a function that C calls by its address; kept on disk like a kernel.

    It has an address once its ``compile()`` was called.

    Args:
        signature: its types, as for ``numba.cfunc``.
    """

    def decorate(function: Any) -> Any:
        compiled: Any = CFunc(function, normalize_signature(signature), locals={}, options={})
        compiled._cache = KernelCache(function)
        return compiled

    return decorate


class _KernelLibrary(JITCodeLibrary):
    """The machine code of one kernel, whose parts no other kernel can call.

    Numba exports parts as weak symbols: of the copies in several kernels, and of the copy that a
    compiling process makes of the part alone, all callers get whichever was loaded first. Each copy
    is optimised for its kernel, so the last bits of a result would depend on what ran before.
    """

    def _finalize_final_module(self):
        for function in self._final_module.functions:
            if function.linkage == llvm.Linkage.linkonce_odr:
                function.linkage = "internal"
        super()._finalize_final_module()


@register_pass(mutates_CFG=False, analysis_only=False)
class _StartLibrary(LoweringPass):
    """Gives a kernel a ``_KernelLibrary`` before Numba's lowering looks for a library."""

    _name = "start_kernel_library"

    def __init__(self):
        LoweringPass.__init__(self)

    def run_pass(self, state):
        state.library = _KernelLibrary(state.targetctx.codegen(), state.func_id.func_qualname)
        state.library.enable_object_caching()
        return True


class _KernelCompiler(Compiler):
    """Numba's own passes, and ``_StartLibrary`` before its lowering."""

    def define_pipelines(self):
        (passes,) = super().define_pipelines()
        kinds = [kind for kind, _ in passes.passes]
        passes.add_pass_after(_StartLibrary, kinds[kinds.index(NativeLowering) - 1])
        passes.finalize()
        return [passes]
