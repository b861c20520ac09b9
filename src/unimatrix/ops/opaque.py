"""What ``torch.compile`` cannot look into, as operators that it takes whole.

Compiled loops, a hash table, an automaton: eagerly they are called as they are, which costs less;
while a graph is captured, through these. Each knows its results' shapes and, where it has one, its
derivative. What is not here (norm guard, delta rule on the CPU, anything carried on) breaks a graph
in two or falls back to tensor operations, and stays correct.
"""

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("unimatrix::scan_projected", mutates_args=(), device_types="cpu")
def scan_projected(
    projected: Tensor, controls: Tensor, initial: Tensor, lengths: Tensor | None, unit: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run the native scan of a layer's projections; see ``projected_native.run_forward``."""
    from unimatrix.ops.matrix_state.projected_native import run_forward

    return run_forward(
        projected.contiguous(),
        controls.contiguous(),
        initial.contiguous(),
        lengths,
        unit=unit,
        saves=True,
    )


@scan_projected.register_fake
def _(
    projected: Tensor, controls: Tensor, initial: Tensor, lengths: Tensor | None, unit: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from unimatrix.ops.matrix_state.native import choose_interval

    B, T, _, H, N = projected.shape
    interval = choose_interval(N)
    return (
        projected.new_empty(B, T, H, N),
        initial.new_empty(initial.shape),
        projected.new_empty(B, H, (T + interval - 1) // interval, N, N),
        projected.new_empty(B, T, H, 5),
        projected.new_empty(B, T, H),
    )


@torch.library.custom_op("unimatrix::scan_projected_backward", mutates_args=(), device_types="cpu")
def _scan_projected_backward(
    projected: Tensor,
    lengths: Tensor | None,
    saved: list[Tensor],
    dy: Tensor,
    dfinal: Tensor,
    unit: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from unimatrix.ops.matrix_state.projected_native import run_backward

    given = (projected.contiguous(), lengths, tuple(x.contiguous() for x in saved))
    return run_backward(*given, dy.contiguous(), dfinal.contiguous(), unit=unit)


@_scan_projected_backward.register_fake
def _(
    projected: Tensor,
    lengths: Tensor | None,
    saved: list[Tensor],
    dy: Tensor,
    dfinal: Tensor,
    unit: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    B, T, P, H, _ = projected.shape
    dcontrols = projected.new_empty(B, T, H * (4 if P == 4 else 1))
    return projected.new_empty(projected.shape), dcontrols, dfinal.new_empty(dfinal.shape)


def _keep_scan(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    projected, _, _, lengths, unit = inputs
    y, _, checkpoints, weights, inverses = output
    ctx.save_for_backward(projected, lengths, checkpoints, weights, y, inverses)
    ctx.unit = unit


def _differentiate_scan(ctx: Any, dy: Tensor, dfinal: Tensor, *_unused: Any) -> tuple[Any, ...]:
    projected, lengths, *saved = ctx.saved_tensors
    dprojected, dcontrols, dinitial = _scan_projected_backward(
        projected, lengths, saved, dy, dfinal, ctx.unit
    )
    return dprojected, dcontrols, dinitial, None, None


scan_projected.register_autograd(_differentiate_scan, setup_context=_keep_scan)


@torch.library.custom_op("unimatrix::allocate_slots", mutates_args=())
def allocate_slots(
    queries: Tensor,
    keys: Tensor,
    strengths: Tensor,
    initial_ages: Tensor,
    reads: Tensor,
    writes: Tensor,
    slots_per_read: int,
    match_threshold: float,
    strength_floor: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Decide reads and writes of slots; see ``slots.native.allocate_native``."""
    from unimatrix.ops.slots.native import allocate_native
    from unimatrix.ops.slots.slot_state import SlotRules

    rules = SlotRules(slots_per_read, match_threshold, strength_floor)
    chosen, writers, ages = allocate_native(
        queries, keys, strengths, initial_ages, reads=reads, writes=writes, rules=rules
    )
    return chosen, writers, ages


@allocate_slots.register_fake
def _(
    queries: Tensor,
    keys: Tensor,
    strengths: Tensor,
    initial_ages: Tensor,
    reads: Tensor,
    writes: Tensor,
    slots_per_read: int,
    match_threshold: float,
    strength_floor: float,
) -> tuple[Tensor, Tensor, Tensor]:
    chosen = initial_ages.new_empty(*queries.shape[:2], slots_per_read)
    held = initial_ages.shape
    return chosen, initial_ages.new_empty(held), initial_ages.new_empty(held)


@torch.library.custom_op("unimatrix::scan_selective_slots", mutates_args=())
def scan_selective_slots(
    writes: list[Tensor], initial: list[Tensor], bounded: bool, rules: list[int]
) -> list[Tensor]:
    """Run selective slots; see the operator of that name.

    Args:
        writes: fields of ``SlotWrites``.
        initial: fields of ``SelectiveSlots``.
        bounded: as in ``SlotPolicy``.
        rules: margin, keep_first and fade_tokens of ``SlotPolicy``.

    Returns:
        the fields of the lookup, of the slots afterwards, and writers; the last four mean nothing
        without a bound.
    """
    from unimatrix.ops.selective_slots.native import scan_native
    from unimatrix.ops.selective_slots.state import SelectiveSlots, SlotPolicy, SlotWrites

    margin, keep_first, fade_tokens = rules
    lookup, slots, writers = scan_native(
        SlotWrites(*(x.cpu() for x in writes)),
        SelectiveSlots(*(x.cpu() for x in initial)),
        SlotPolicy(bounded, margin, bool(keep_first), fade_tokens),
    )
    if slots is None or writers is None:
        slots = SelectiveSlots(*(torch.empty_like(x) for x in initial))
        writers = torch.empty_like(initial[0], dtype=torch.int64)
    return [x.to(writes[0].device) for x in (*lookup, *slots, writers)]


@scan_selective_slots.register_fake
def _(writes: list[Tensor], initial: list[Tensor], bounded: bool, rules: list[int]) -> list[Tensor]:
    found = [writes[0].new_empty(writes[0].shape) for _ in range(3)]
    slots = [torch.empty_like(x) for x in initial]
    return [*found, *slots, torch.empty_like(initial[0], dtype=torch.int64)]


@torch.library.custom_op("unimatrix::match_suffixes", mutates_args=())
def match_suffixes(input_ids: Tensor, window: int | None) -> Tensor:
    """Return what the automaton predicts in rows of their own, and how long it matched.

    Args:
        input_ids: [B, T] int64.
        window: as in ``predict_from_suffix``.

    Returns:
        [B, T, 2] int64.
    """
    from unimatrix.ops.suffix_automaton import predict_from_suffix

    prediction, _ = predict_from_suffix(input_ids, window=window, keeps_state=False)
    return torch.stack(prediction, dim=-1)


@match_suffixes.register_fake
def _(input_ids: Tensor, window: int | None) -> Tensor:
    return input_ids.new_empty(*input_ids.shape, 2)
