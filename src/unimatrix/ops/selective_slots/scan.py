"""The selective-slots operator: checks what comes in, chooses a back end."""

import torch
from torch import Tensor

from unimatrix.errors import InputError
from unimatrix.ops.backends import compiles_native, compiles_triton, require_backend, require_triton
from unimatrix.ops.checks import require_dtype, require_lengths, require_shape
from unimatrix.ops.operator import declare_operator
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


# Places that a program of the GPU's kernel can hold: whole numbers in its registers.
_MOST_TRITON_PLACES = 4096


def choose_backend(device: torch.device, num_slots: int, *, bounded: bool = True) -> str:
    """Return what ``auto`` means, for M slots or, as in training, without a bound.

    Returns:
        ``native``, on the CPU whatever the device, or ``reference`` where kernels do not run
        here; on a GPU ``triton`` for M slots, where it
        compiles and can hold them: nothing then waits for the CPU. Without a bound it compares
        with every write where ``native`` has a hash table, so it must be chosen by name.
        Neither choice has been timed on a GPU.
    """
    fits = bounded and num_slots <= _MOST_TRITON_PLACES and compiles_triton(device)
    if fits:
        return "triton"
    return "native" if compiles_native() else "reference"


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
        read_keys: [B, T, Q] int64, contexts that position t looks up, -1 for none.
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
        backend: ``auto`` (see ``choose_backend``), ``reference``, ``native`` or ``triton`` (a GPU;
            M up to 4,096, without a bound M and all writes).

    Returns:
        what each position found; if ``bounded``, the slots after the last real token and which
        entry is in each. A position sees the writes of those before it, not its own.

    Raises:
        InputError: if a shape or dtype does not fit, lengths or a code are out of range (checked on
            the CPU), or the back end is unknown or cannot run this.

    Cost:
        O(B T (Q + N) M) integer comparisons, on the CPU whatever the device but with ``triton``;
        nothing is differentiable. Deterministic; any split of a stream finds the same.
    """
    batch, num_tokens = value_ids.shape[:2]
    are_given = lengths is not None
    if lengths is None:
        lengths = torch.full((batch,), num_tokens, device=read_keys.device)
    if first_position is None:
        first_position = torch.zeros_like(lengths)
    writes = SlotWrites(read_keys, write_keys, value_ids, codes, first_position, lengths)
    _check(writes, initial)
    if are_given:
        require_lengths(lengths, num_tokens)
    backend = _find_backend(backend, writes, initial, bounded)
    scan = _scan if backend == "reference" else _scan_slots
    rules = [margin, int(keep_first), fade_tokens or 0]
    results = scan([x.detach() for x in writes], list(initial), bounded, rules, backend)
    lookup = SlotLookup(*results[:3])
    if not bounded:
        return SlotScan(lookup, None, None)
    return SlotScan(lookup, SelectiveSlots(*results[3:6]), results[6])


def _find_backend(backend: str, writes: SlotWrites, initial: SelectiveSlots, bounded: bool) -> str:
    """Return the back end to run, or raise if the one named cannot."""
    device = writes.read_keys.device
    if backend == "auto":
        return choose_backend(device, initial.slot_keys.shape[1], bounded=bounded)
    if require_backend("selective_slots", backend) == "triton":
        num_places = _count_places(writes, initial, bounded)
        if num_places > _MOST_TRITON_PLACES:
            raise InputError(
                f"backend 'triton' is for {_MOST_TRITON_PLACES} places, and this takes "
                f"{num_places}; choose native."
            )
        require_triton(device)
    return backend


def _count_places(writes: SlotWrites, initial: SelectiveSlots, bounded: bool) -> int:
    """Return how many contexts a row may hold at most."""
    num_slots = initial.slot_keys.shape[1]
    return num_slots if bounded else num_slots + writes.write_keys[0].numel()


def _scan(
    writes: list[Tensor], initial: list[Tensor], bounded: bool, rules: list[int], backend: str
) -> list[Tensor]:
    """Scan with ``triton`` where the tensors are, else on the CPU and back.

    Args:
        writes: fields of ``SlotWrites``.
        initial: fields of ``SelectiveSlots``.
        bounded: as in ``SlotPolicy``.
        rules: margin, keep_first and fade_tokens of ``SlotPolicy``.
        backend: ``reference``, ``native`` or ``triton``.

    Returns:
        the fields of the lookup; if ``bounded``, then of the slots afterwards, and writers.

    Raises:
        InputError: if a code is out of range (checked on the CPU).
    """
    device = writes[0].device
    place = device if backend == "triton" else torch.device("cpu")
    offered = SlotWrites(*(tensor.to(place) for tensor in writes))
    slots = SelectiveSlots(*(tensor.to(place) for tensor in initial))
    margin, keep_first, fade_tokens = rules
    policy = SlotPolicy(bounded, margin, bool(keep_first), fade_tokens)
    if place.type == "cpu":
        _check_codes(offered.codes)
    # Imported here: both load a compiler.
    if backend == "triton":
        from unimatrix.ops.selective_slots.triton import scan_triton

        scan = scan_triton(offered, slots, policy, _count_places(offered, slots, bounded))
    elif backend == "native":
        from unimatrix.ops.selective_slots.native import scan_native

        scan = scan_native(offered, slots, policy)
    else:
        scan = scan_reference(offered, slots, policy)
    results = [*scan.lookup]
    if scan.slots is not None and scan.writers is not None:
        results += [*scan.slots, scan.writers]
    return [tensor.to(device) for tensor in results]


def _make_results(
    writes: list[Tensor], initial: list[Tensor], bounded: bool, *_: object
) -> list[Tensor]:
    """Return empty tensors like those of ``_scan``."""
    like = [*[writes[0]] * 3, *([*initial, initial[0].long()] if bounded else [])]
    return [x.new_empty(x.shape) for x in like]


_scan_slots = declare_operator("scan_selective_slots", _scan, shapes=_make_results, devices=None)


def _check(writes: SlotWrites, initial: SelectiveSlots) -> None:
    """Raise unless every argument has its shape and dtype."""
    sizes: dict[str, int] = {}
    for name, tensor in (writes._asdict() | initial._asdict()).items():
        require_shape(name, tensor, _SHAPES[name], sizes)
    for name, tensor in writes._asdict().items():
        require_dtype(name, tensor, torch.int64)


def _check_codes(codes: Tensor) -> None:
    """Raise unless the codes are strength codes."""
    smallest, largest = (int(bound) for bound in codes.aminmax())
    if smallest < MIN_CODE or largest > MAX_CODE:
        raise InputError(
            f"codes holds {smallest if smallest < MIN_CODE else largest}; pass "
            f"{MIN_CODE} to {MAX_CODE}."
        )
