"""How Triton runs its kernels in this process."""

import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

INTERPRETED: bool = isinstance(tl.cdiv, InterpretedFunction)
"""Whether kernels are interpreted on the CPU: ``TRITON_INTERPRET=1`` when Triton was imported."""
