"""The dense associative memory operator: checks what comes in, chooses a back end, casts."""

import torch
from torch import Tensor

from unimatrix.errors import InputError
from unimatrix.ops.backends import require_backend
from unimatrix.ops.checks import find_real_tokens, require_dtype, require_shape
from unimatrix.ops.cosine_read import choose_compute_dtype
from unimatrix.ops.dense_memory.entries import DenseMemory
from unimatrix.ops.dense_memory.parallel import read_parallel
from unimatrix.ops.dense_memory.reference import read_reference


def read_dense_memory(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    writable: Tensor,
    topk: int,
    initial: DenseMemory | None,
    lengths: Tensor | None = None,
    chunk_size: int = 256,
    backend: str = "auto",
) -> tuple[Tensor, DenseMemory]:
    """Read the best K of all earlier pairs at every token, then append the token's own pair.

    Equation: E5.
    Source: paper, section on Assoc; published code ``model/unimatrix.py``.

    Args:
        queries: [B, T, C], any float; what position t reads with.
        keys: [B, T, C], the key that position t appends: that of the real token before it.
        values: [B, T, Dv], the value that position t appends.
        writable: [B, T] bool, False where there is no token before.
        topk: K; fewer while fewer are stored.
        initial: pairs from before the first token; ``None`` is none.
        lengths: [B] int64, leading real tokens of each row; ``None`` is T for all.
        chunk_size: queries scored together in the ``parallel`` form.
        backend: ``auto`` (= ``parallel``), ``reference`` or ``parallel``.

    Returns:
        context [B, T, Dv] in the dtype of ``values``, zero on padding and while nothing is stored;
        and the P + T pairs (float32, float64 if any input is), invalid where nothing was written;
        without ``initial`` they may alias ``keys`` and ``values``.
        Differentiable in all floating arguments. With K = 1 the weight is exactly 1 and queries and
        keys get a gradient of exactly 0.

    Raises:
        InputError: if a shape or dtype does not fit, T, K or ``chunk_size`` is 0, or the back end
            is unknown.

    Cost:
        ``parallel``: O(B T (P + T) C) time, chunk_size x (P + T) float64 scores a row. Causal;
        equal scores go to the lowest index on every back end (``ops.cosine_read``).
    """
    if initial is not None and initial.keys.shape[1] == 0:
        initial = None
    _check(queries, keys, values, writable, lengths, initial)
    if min(topk, chunk_size) < 1:
        raise InputError(f"topk is {topk} and chunk_size {chunk_size}; both must be at least 1.")
    backend = require_backend("dense_memory", "parallel" if backend == "auto" else backend)
    floats = (queries, keys, values, *(initial[:2] if initial is not None else ()))
    dtype = choose_compute_dtype(*floats)
    reads = find_real_tokens(lengths, writable)  # [B, T]
    entries = DenseMemory(keys.to(dtype), values.to(dtype), writable & reads)
    if initial is not None:
        before = (initial.keys.to(dtype), initial.values.to(dtype), initial.valid)
        pairs = zip(before, entries, strict=True)
        entries = DenseMemory(*(torch.cat(pair, dim=1) for pair in pairs))
    topk = min(topk, entries.keys.shape[1])
    with torch.autocast(queries.device.type, enabled=False):
        if backend == "reference":
            context = read_reference(queries.to(dtype), entries, reads, topk)
        else:
            context = read_parallel(queries.to(dtype), entries, reads, topk, chunk_size)
    return context.to(values.dtype), entries


def _check(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    writable: Tensor,
    lengths: Tensor | None,
    initial: DenseMemory | None,
) -> None:
    """Raise unless every tensor has its shape and dtype."""
    expected: list[tuple[str, Tensor, str, torch.dtype | None]] = [
        ("queries", queries, "B T C", None),
        ("keys", keys, "B T C", None),
        ("values", values, "B T Dv", None),
        ("writable", writable, "B T", torch.bool),
    ]
    if lengths is not None:
        expected.append(("lengths", lengths, "B", torch.int64))
    if initial is not None:
        expected += [
            ("initial.keys", initial.keys, "B P C", None),
            ("initial.values", initial.values, "B P Dv", None),
            ("initial.valid", initial.valid, "B P", torch.bool),
        ]
    sizes: dict[str, int] = {}
    for name, tensor, letters, dtype in expected:
        require_shape(name, tensor, letters, sizes)
        require_dtype(name, tensor, dtype)
