"""The selective-slots operator: checks what comes in, chooses a back end."""

import torch
from torch import Tensor

from unimatrix.errors import InputError
from unimatrix.ops.backends import require_backend
from unimatrix.ops.checks import require_dtype, require_shape
from unimatrix.ops.selective_slots.reference import scan_reference
from unimatrix.ops.selective_slots.state import (
    MAX_CODE,
    MIN_CODE,
    SelectiveSlots,
    SlotLookup,
    SlotPolicy,
    SlotScan,
    SlotWrites,
)

_SHAPES = {
    "read_keys": "B T Q",
    "write_keys": "B T N",
    "value_ids": "B T",
    "codes": "B T N",
    "first_position": "B",
    "lengths": "B",
    "slot_keys": "B M",
    "slot_value_ids": "B M",
    "slot_codes": "B M",
}


def choose_backend() -> str:
    """Return what ``auto`` means: ``native``, on the CPU whatever the device."""
    return "native"


def scan_selective_slots(
    read_keys: Tensor,
    write_keys: Tensor,
    value_ids: Tensor,
    codes: Tensor,
    *,
    initial: SelectiveSlots,
    bounded: bool = True,
    margin: int = 8,
    keep_first: bool = False,
    fade_tokens: int | None = None,
    first_position: Tensor | None = None,
    lengths: Tensor | None = None,
    backend: str = "auto",
) -> SlotScan:
    """Look contexts up in M slots, and offer new ones, token after token.

    Equation: E13 (look up), E14 (write).
    Source: this project; the rule that a weaker write is refused goes past the paper, whose gate
    sets the strength only.

    Args:
        read_keys: [B, T, Q] int64, contexts that position t asks for, -1 for none.
        write_keys: [B, T, N] int64, contexts that position t offers, -1 for none.
        value_ids: [B, T] int64, the value of all offers of position t.
        codes: [B, T, N] int64 in -128..127, strength codes (sigmoid(code / 8) is the strength).
        initial: the M slots before the first token.
        bounded: M slots; otherwise every offer finds a place, as in training.
        margin: codes by which an offer must exceed the slot it displaces, and may fall short of
            the same context's.
        keep_first: a context met again keeps its value unless the new one exceeds it by the margin.
        fade_tokens: codes of all slots fall by one every so many tokens of the stream; ``None`` is
            never.
        first_position: [B] int64, tokens of the stream before these; ``None`` is 0.
        lengths: [B] int64, leading real tokens of each row; ``None`` is T for all.
        backend: ``auto``, ``reference`` or ``native``.

    Returns:
        what each position found; if ``bounded``, the slots after the last real token and which
        entry is in each. A position sees the writes of those before it, not its own.

    Raises:
        InputError: if a shape or dtype does not fit, a code is out of range, or the back end is
            unknown.

    Cost:
        O(B T (Q + N) M) integer comparisons on the CPU, whatever the device; nothing is
        differentiable. Deterministic; any split of a stream finds the same.
    """
    device = read_keys.device
    batch, num_tokens = value_ids.shape[:2]
    if lengths is None:
        lengths = torch.full((batch,), num_tokens, dtype=torch.int64)
    if first_position is None:
        first_position = torch.zeros(batch, dtype=torch.int64)
    writes = SlotWrites(read_keys, write_keys, value_ids, codes, first_position, lengths)
    _check(writes, initial)
    policy = SlotPolicy(bounded, margin, keep_first, fade_tokens or 0)
    name = choose_backend() if backend == "auto" else backend
    if require_backend("selective_slots", name) == "reference":
        scan = scan_reference
    else:
        from unimatrix.ops.selective_slots.native import scan_native as scan
    writes = SlotWrites(*(tensor.detach().cpu() for tensor in writes))
    lookup, slots, writers = scan(
        writes, SelectiveSlots(*(tensor.cpu() for tensor in initial)), policy
    )
    lookup = SlotLookup(*(tensor.to(device) for tensor in lookup))
    if slots is None or writers is None:
        return SlotScan(lookup, None, None)
    slots = SelectiveSlots(*(tensor.to(device) for tensor in slots))
    return SlotScan(lookup, slots, writers.to(device))


def _check(writes: SlotWrites, initial: SelectiveSlots) -> None:
    """Raise unless every argument has its shape, dtype and range."""
    sizes: dict[str, int] = {}
    for name, tensor in (writes._asdict() | initial._asdict()).items():
        require_shape(name, tensor, _SHAPES[name], sizes)
    for name, tensor in writes._asdict().items():
        require_dtype(name, tensor, torch.int64)
    smallest, largest = (int(bound) for bound in writes.codes.aminmax())
    if smallest < MIN_CODE or largest > MAX_CODE:
        raise InputError(
            f"codes holds {smallest if smallest < MIN_CODE else largest}; pass "
            f"{MIN_CODE} to {MAX_CODE}."
        )
