"""The slots operator: checks what comes in, chooses a back end, casts."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from unimatrix.errors import InputError
from unimatrix.ops.backends import compiles_native, compiles_triton, require_backend, require_triton
from unimatrix.ops.checks import find_real_tokens, require_dtype, require_shape
from unimatrix.ops.cosine_read import choose_compute_dtype, read_chosen
from unimatrix.ops.operator import declare_operator
from unimatrix.ops.slots.decisions import Allocation, Undecided
from unimatrix.ops.slots.parallel import allocate_parallel
from unimatrix.ops.slots.read import scan_by_allocation
from unimatrix.ops.slots.reference import scan_slots_reference
from unimatrix.ops.slots.slot_state import SlotRead, SlotRules, SlotState, SlotTokens

Scan = Callable[[SlotTokens, SlotState, SlotRules], tuple[SlotRead, SlotState]]

_LETTERS = {
    "queries": "B T C",
    "keys": "B T C",
    "values": "B T Dv",
    "strengths": "B T",
    "token_ids": "B T",
    "writable": "B T",
    "lengths": "B",
    "slot_keys": "B M C",
    "slot_values": "B M Dv",
    "slot_strength": "B M",
    "slot_age": "B M",
    "slot_token_ids": "B M",
}
_DTYPES = {
    "token_ids": torch.int64,
    "writable": torch.bool,
    "lengths": torch.int64,
    "slot_age": torch.int64,
    "slot_token_ids": torch.int64,
}


# Numbers of the slots' keys that a program of the GPU's kernel can hold, M and C rounded up to
# powers of two: 8 bytes each in its registers.
_MOST_TRITON_NUMBERS = 1 << 14


def choose_backend(
    device: torch.device, num_tokens: int, num_slots: int = 1, key_size: int = 1
) -> str:
    """Return what ``auto`` means.

    Returns:
        ``native``, or ``parallel`` where kernels do not run here; on a GPU ``parallel`` for a
        single token, which then need not wait for the CPU, and for more ``triton``, where it
        compiles and can hold the slots.
    """
    if device.type == "cuda" and num_tokens == 1:
        return "parallel"
    fits = _fits_triton(num_slots, key_size) and compiles_triton(device)
    if fits:
        return "triton"
    return "native" if compiles_native() else "parallel"


def _fits_triton(num_slots: int, key_size: int) -> bool:
    """Return whether a program of the GPU's kernel can hold the keys of the slots."""
    bits = (num_slots - 1).bit_length() + (key_size - 1).bit_length()
    return 1 << bits <= _MOST_TRITON_NUMBERS


def scan_slots(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    strengths: Tensor,
    token_ids: Tensor,
    *,
    writable: Tensor,
    slots_per_read: int,
    initial: SlotState,
    match_threshold: float = 0.85,
    strength_floor: float = 0.05,
    lengths: Tensor | None = None,
    backend: str = "auto",
) -> tuple[SlotRead, SlotState]:
    """Read M slots and write one of them, token after token.

    Equation: E6 to E9.
    Source: paper, section on SparsePointer; published code ``model/unimatrix.py``.

    Args:
        queries: [B, T, C], any float; what position t reads with.
        keys: [B, T, C], the key that position t writes: that of the real token before it.
        values: [B, T, Dv], the value that position t writes.
        strengths: [B, T] in [0, 1], the strength it writes; later reads add its logarithm.
        token_ids: [B, T] int64, the id it writes.
        writable: [B, T] bool, False where there is no token before.
        slots_per_read: K; M if larger.
        initial: the M slots before the first token.
        match_threshold: the closest filled slot is overwritten if its cosine is above.
        strength_floor: a slot is filled if its strength is above.
        lengths: [B] int64, leading real tokens of each row; ``None`` is T for all.
        backend: ``auto`` (see ``choose_backend``), ``reference``, ``parallel``, ``native`` or
            ``triton`` (a GPU).

    Returns:
        what each position read (in the dtype of ``values``, zero on padding; min(K, M) columns),
        and new slots after the last real token (float32, float64 if any input is). Differentiable
        in all floating arguments and in the floats of ``initial``; choices carry no gradient.

    Raises:
        InputError: if a shape or dtype does not fit, T or K is 0, or the back end is unknown or
            cannot run here.

    Cost:
        O(B T M C) for the choices, O(B T K (C + Dv)) for the read. Causal; the same choices on
        every back end and for every split (``ops.cosine_read``), in float32 up to the rounding of
        what comes in. ``native`` chooses on the CPU, whatever the device. With ``triton`` the last
        bits of the gradients vary, unless torch is told to be deterministic.
    """
    tokens = SlotTokens(
        queries, keys, values, strengths, token_ids, reads=writable, writes=writable
    )
    _check(tokens, initial, lengths)
    if slots_per_read < 1:
        raise InputError(f"slots_per_read is {slots_per_read}; read at least one slot.")
    scan = _find_scan(backend, queries, initial.slot_keys.shape[1])
    num_read = min(slots_per_read, initial.slot_keys.shape[1])
    rules = SlotRules(num_read, match_threshold, strength_floor)
    with torch.autocast(queries.device.type, enabled=False):
        read, final = scan(*_cast(tokens, initial, lengths), rules)
    context, weights = read.context.to(values.dtype), read.pointer_weights.to(values.dtype)
    return SlotRead(context, read.pointer_token_ids, weights), final


def _check(tokens: SlotTokens, initial: SlotState, lengths: Tensor | None) -> None:
    """Raise unless every argument has its shape and dtype."""
    named = tokens._asdict() | initial._asdict() | {"writable": tokens.writes, "lengths": lengths}
    sizes: dict[str, int] = {}
    for name, letters in _LETTERS.items():
        if named[name] is not None:
            require_shape(name, named[name], letters, sizes)
            require_dtype(name, named[name], _DTYPES.get(name))


def _cast(
    tokens: SlotTokens, initial: SlotState, lengths: Tensor | None
) -> tuple[SlotTokens, SlotState]:
    """Bring floats to the compute dtype and mask what padding would read and write."""
    dtype = choose_compute_dtype(*tokens[:4], *initial[:3])
    real = find_real_tokens(lengths, tokens.writes)  # [B, T]
    tokens = tokens._replace(
        queries=tokens.queries.to(dtype),
        keys=tokens.keys.to(dtype),
        values=tokens.values.to(dtype),
        strengths=tokens.strengths.to(dtype),
        reads=real,
        writes=tokens.writes & real,
    )
    slots = initial._replace(
        slot_keys=initial.slot_keys.to(dtype),
        slot_values=initial.slot_values.to(dtype),
        slot_strength=initial.slot_strength.to(dtype),
    )
    return tokens, slots


def _find_scan(backend: str, queries: Tensor, num_slots: int) -> Scan:
    """Return the scan of a back end; Numba or Triton is imported when first needed."""
    _, num_tokens, key_size = queries.shape
    if backend == "auto":
        backend = choose_backend(queries.device, num_tokens, num_slots, key_size)
    if require_backend("slots", backend) == "reference":
        return scan_slots_reference
    if backend == "parallel":
        return functools.partial(scan_by_allocation, allocate_parallel, read_chosen)
    if backend == "triton":
        if not _fits_triton(num_slots, key_size):
            raise InputError(
                f"backend 'triton' holds no {num_slots} slots with keys of {key_size} numbers; "
                "choose native."
            )
        require_triton(queries.device)
    allocate = functools.partial(_allocate_by, backend)
    if torch.compiler.is_compiling():
        return functools.partial(scan_by_allocation, allocate, read_chosen)
    if backend == "triton":
        from unimatrix.ops.slots.triton import read_triton as read
    else:
        from unimatrix.ops.slots.read_native import read_native as read
    return functools.partial(scan_by_allocation, allocate, read)


def _allocate_by(backend: str, tokens: Undecided, rules: SlotRules) -> Allocation:
    """Decide with ``native`` or ``triton``, inside a captured graph too."""
    return Allocation(*_allocate_slots(*tokens, *rules, backend))


def _allocate(
    queries: Tensor,
    keys: Tensor,
    strengths: Tensor,
    initial_ages: Tensor,
    reads: Tensor,
    writes: Tensor,
    slots_per_read: int,
    match_threshold: float,
    strength_floor: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    # Imported here: both load a compiler.
    if backend == "triton":
        from unimatrix.ops.slots.triton import allocate_triton as allocate
    else:
        from unimatrix.ops.slots.native import allocate_native as allocate
    tokens = Undecided(queries, keys, strengths, initial_ages, reads, writes)
    chosen, writers, ages = allocate(
        tokens, SlotRules(slots_per_read, match_threshold, strength_floor)
    )
    return chosen, writers, ages


_allocate_slots = declare_operator(
    "allocate_slots",
    _allocate,
    results="chosen writers ages",
    shapes=lambda queries, keys, strengths, ages, reads, writes, num_read, *_: (
        ages.new_empty(*queries.shape[:2], num_read),
        ages.new_empty(ages.shape),
        ages.new_empty(ages.shape),
    ),
    devices=None,
)
