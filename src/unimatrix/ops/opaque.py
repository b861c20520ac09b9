"""What ``torch.compile`` cannot look into, as operators that it takes whole.

Compiled loops, a hash table, an automaton: eagerly they are called as they are, which costs less;
while a graph is captured, through these. Each knows its results' shapes and, where it has one, its
derivative. What is not here (norm guard, delta rule on the CPU, anything carried on) breaks a graph
in two or falls back to tensor operations, and stays correct.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from unimatrix.ops.fused_passes.feed_forward_native import PreparedFeedForward
    from unimatrix.ops.fused_passes.projection_native import PreparedProjections


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


def fill_absent(weights: Sequence[Tensor | None]) -> list[Tensor]:
    """Return weights with an empty tensor for ``None``, which a list of an operator cannot hold."""
    first = next(weight for weight in weights if weight is not None)
    return [first.new_empty(0) if weight is None else weight for weight in weights]


def _without_empty(weights: Sequence[Tensor]) -> list[Any]:
    """Return weights with ``None`` for what is empty."""
    return [weight if weight.numel() else None for weight in weights]


def _prepare_projections(weights: list[Tensor], panels: list[Tensor]) -> "PreparedProjections":
    """Put together what an operator was given of projections."""
    from unimatrix.ops.fused_passes import projection_native as native

    joined = native.ProjectionWeights(*_without_empty(weights))
    return native.PreparedProjections(joined, *panels)


def _prepare_feed_forward(weights: list[Tensor], panels: list[Tensor]) -> "PreparedFeedForward":
    """Put together what an operator was given of a feed-forward network."""
    from unimatrix.ops.fused_passes import feed_forward_native as native

    joined = native.FeedForwardWeights(*_without_empty(weights))
    return native.PreparedFeedForward(joined, *panels)


@torch.library.custom_op("unimatrix::project", mutates_args=(), device_types="cpu")
def project(
    x: Tensor,
    recent: Tensor | None,
    weights: list[Tensor],
    panels: list[Tensor],
    squashes: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run norm, convolution and projections; see ``projection_native.PreparedProjections``."""
    from unimatrix.ops.fused_passes import projection_native as native

    prepared = _prepare_projections(weights, panels)
    return native.run_forward(x.contiguous(), recent, prepared, squashes=squashes)


@project.register_fake
def _(
    x: Tensor,
    recent: Tensor | None,
    weights: list[Tensor],
    panels: list[Tensor],
    squashes: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    vectors, controls = (x.new_empty(*x.shape[:2], weight.shape[0]) for weight in weights[3:5])
    return x.new_empty(x.shape), vectors, controls


@torch.library.custom_op("unimatrix::project_backward", mutates_args=(), device_types="cpu")
def _project_backward(
    x: Tensor,
    recent: Tensor | None,
    weights: list[Tensor],
    panels: list[Tensor],
    vectors: Tensor,
    grads: list[Tensor],
    squashes: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from unimatrix.ops.fused_passes import projection_native as native

    prepared = _prepare_projections(weights, panels)
    return native.run_backward(x.contiguous(), recent, prepared, vectors, *grads, squashes=squashes)


@_project_backward.register_fake
def _(
    x: Tensor,
    recent: Tensor | None,
    weights: list[Tensor],
    panels: list[Tensor],
    vectors: Tensor,
    grads: list[Tensor],
    squashes: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    B, _, D = x.shape
    num_before = max(weights[2].shape[0] - 1, 0)
    count = D + sum(weight.numel() for weight in (weights[0], *weights[2:]))
    return x.new_empty(x.shape), x.new_empty(B, num_before, D), x.new_empty(count)


def _keep_all(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Keep every tensor given, and how they were grouped."""
    ctx.groups = [len(group) if isinstance(group, list) else None for group in inputs]
    flat = [
        [group] if size is None else group for group, size in zip(inputs, ctx.groups, strict=True)
    ]
    ctx.save_for_backward(*[tensor for group in flat for tensor in group])


def _recall_all(ctx: Any) -> list[Any]:
    """Return what ``_keep_all`` kept."""
    tensors = iter(ctx.saved_tensors)
    return [
        next(tensors) if size is None else [next(tensors) for _ in range(size)]
        for size in ctx.groups
    ]


def _keep_projections(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _keep_all(ctx, (*inputs[:-1], output[1]), output)
    ctx.squashes = inputs[-1]


def _differentiate_projections(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    from unimatrix.ops.fused_passes import projection_native as native

    x, recent, weights, panels, vectors = _recall_all(ctx)
    given = (x, recent, weights, panels, vectors, list(grads), ctx.squashes)
    dx, drecent, row = _project_backward(*given)
    of_weights = native.split_gradients(row, _prepare_projections(weights, panels).weights)
    of_recent = None if recent is None else drecent.to(recent.dtype)
    return dx, of_recent, list(of_weights), [None] * len(panels), None


project.register_autograd(_differentiate_projections, setup_context=_keep_projections)


@torch.library.custom_op("unimatrix::add_mixed", mutates_args=(), device_types="cpu")
def add_mixed(
    x: Tensor, h: Tensor, contexts: list[Tensor], weights: list[Tensor], panels: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Run projection, gates and gated sum; see ``mixing_native.PreparedMixing``."""
    from unimatrix.ops.fused_passes import mixing_native as native

    readout, *others = (context.contiguous() for context in contexts)
    prepared = native.PreparedMixing(*weights, *panels)
    return native.run_forward(x.contiguous(), h.contiguous(), readout, others, prepared, saves=True)


@add_mixed.register_fake
def _(
    x: Tensor, h: Tensor, contexts: list[Tensor], weights: list[Tensor], panels: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    width = x.shape[-1]
    num_rows = x.numel() // width
    gates = x.new_empty(num_rows, weights[1].shape[0])
    return x.new_empty(x.shape), gates, x.new_empty(num_rows, width)


@torch.library.custom_op("unimatrix::add_mixed_backward", mutates_args=(), device_types="cpu")
def _add_mixed_backward(
    h: Tensor,
    contexts: list[Tensor],
    kept: list[Tensor],
    weights: list[Tensor],
    panels: list[Tensor],
    dy: Tensor,
) -> list[Tensor]:
    from unimatrix.ops.fused_passes import mixing_native as native

    readout, *others = (context.contiguous() for context in contexts)
    prepared = native.PreparedMixing(*weights, *panels)
    dh, dreadout, dothers, row = native.run_backward(
        h.contiguous(), readout, others, kept, prepared, dy
    )
    return [dh, dreadout, *dothers, row]


@_add_mixed_backward.register_fake
def _(
    h: Tensor,
    contexts: list[Tensor],
    kept: list[Tensor],
    weights: list[Tensor],
    panels: list[Tensor],
    dy: Tensor,
) -> list[Tensor]:
    row = h.new_empty(sum(weight.numel() for weight in weights))
    return [h.new_empty(h.shape), *(h.new_empty(c.shape) for c in contexts), row]


def _keep_mixing(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _keep_all(ctx, (*inputs[1:], list(output[1:])), output)


def _differentiate_mixing(ctx: Any, dy: Tensor, *_unused: Any) -> tuple[Any, ...]:
    from unimatrix.ops.fused_passes import mixing_native as native

    h, contexts, weights, panels, kept = _recall_all(ctx)
    dh, *dcontexts, row = _add_mixed_backward(h, contexts, kept, weights, panels, dy)
    of_weights = native.split_gradients(row, native.PreparedMixing(*weights, *panels))
    return dy, dh, dcontexts, of_weights, [None] * len(panels)


add_mixed.register_autograd(_differentiate_mixing, setup_context=_keep_mixing)


@torch.library.custom_op("unimatrix::add_feed_forward", mutates_args=(), device_types="cpu")
def add_feed_forward(
    x: Tensor, weights: list[Tensor], panels: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Run norm and feed-forward network; see ``feed_forward_native.PreparedFeedForward``."""
    from unimatrix.ops.fused_passes import feed_forward_native as native

    prepared = _prepare_feed_forward(weights, panels)
    return native.run_forward(x.contiguous(), prepared, saves=True)


@add_feed_forward.register_fake
def _(x: Tensor, weights: list[Tensor], panels: list[Tensor]) -> tuple[Tensor, Tensor]:
    from unimatrix.ops.fused_passes import feed_forward_native as native

    num_kept = native.count_kept(_prepare_feed_forward(weights, panels).weights)
    return x.new_empty(x.shape), x.new_empty(x.numel() // x.shape[-1], num_kept)


@torch.library.custom_op("unimatrix::feed_forward_backward", mutates_args=(), device_types="cpu")
def _feed_forward_backward(
    x: Tensor, kept: Tensor, weights: list[Tensor], panels: list[Tensor], dy: Tensor
) -> tuple[Tensor, Tensor]:
    from unimatrix.ops.fused_passes import feed_forward_native as native

    prepared = _prepare_feed_forward(weights, panels)
    return native.run_backward(x.contiguous(), kept, prepared, dy)


@_feed_forward_backward.register_fake
def _(
    x: Tensor, kept: Tensor, weights: list[Tensor], panels: list[Tensor], dy: Tensor
) -> tuple[Tensor, Tensor]:
    scale, _, up, _, down, _ = weights
    count = up.numel() + down.numel() + 3 * scale.numel() + up.shape[0]
    return x.new_empty(x.shape), x.new_empty(count)


def _keep_feed_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _keep_all(ctx, (*inputs, output[1]), output)


def _differentiate_feed_forward(ctx: Any, dy: Tensor, _unused: Any) -> tuple[Any, ...]:
    from unimatrix.ops.fused_passes import feed_forward_native as native

    x, weights, panels, kept = _recall_all(ctx)
    dx, row = _feed_forward_backward(x, kept, weights, panels, dy)
    of_weights = native.split_gradients(row, _prepare_feed_forward(weights, panels).weights)
    return dx, list(of_weights), [None] * len(panels)


add_feed_forward.register_autograd(_differentiate_feed_forward, setup_context=_keep_feed_forward)


@torch.library.custom_op("unimatrix::sum_cross_entropy", mutates_args=(), device_types="cpu")
def sum_cross_entropy(
    h: Tensor,
    head: list[Tensor],
    targets: Tensor,
    token_ids: Tensor | None,
    shares: Tensor | None,
    ignored: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run head and loss; see ``head_native.PreparedHead`` and ``head_native.run_head``."""
    from unimatrix.ops.fused_passes.head_native import PreparedHead, run_head

    shares = None if shares is None else shares.contiguous()
    given = h.contiguous(), PreparedHead(*head), targets, token_ids, shares
    return run_head(*given, ignored=ignored, saves=True)


@sum_cross_entropy.register_fake
def _(
    h: Tensor,
    head: list[Tensor],
    targets: Tensor,
    token_ids: Tensor | None,
    shares: Tensor | None,
    ignored: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dshares = h.new_empty(0 if shares is None else shares.shape)
    return h.new_empty(()), h.new_empty(h.shape), h.new_empty(head[0].shape), dshares


def _keep_head(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, dh, dweight, dshares = output
    ctx.save_for_backward(dh, dweight, dshares)
    ctx.num_panels, ctx.has_shares = len(inputs[1]) - 1, inputs[4] is not None
    ctx.mark_non_differentiable(dh, dweight, dshares)


def _differentiate_head(ctx: Any, dtotal: Tensor, *_unused: Any) -> tuple[Any, ...]:
    dh, dweight, dshares = ctx.saved_tensors
    of_head = [dtotal * dweight, *[None] * ctx.num_panels]
    return dtotal * dh, of_head, None, None, dtotal * dshares if ctx.has_shares else None, None


sum_cross_entropy.register_autograd(_differentiate_head, setup_context=_keep_head)


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
