"""What ``torch.compile`` cannot look into, as operators that it takes whole.

Compiled loops, a hash table, an automaton: eagerly they are called as they are, which costs less;
while a graph is captured, through these. Each knows its results' shapes and, where it has one, its
derivative. What is not here (norm guard, delta rule on the CPU, anything carried on) breaks a graph
in two or falls back to tensor operations, and stays correct.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unimatrix.kernels.passes.weights import PassWeights


@torch.library.custom_op("unimatrix::scan_projected", mutates_args=(), device_types="cpu")
def scan_projected(
    projected: Tensor, controls: Tensor, initial: Tensor, lengths: Tensor | None, unit: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run the native scan of a layer's projections; see ``projected_native.run_forward``."""
    from unimatrix.ops.matrix_state.fused_scan_native import run_forward

    return run_forward(
        projected.flatten(2).contiguous(),
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
    num_controls: int,
    unit: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from unimatrix.ops.matrix_state.fused_scan_native import run_backward

    vectors, kept = projected.flatten(2).contiguous(), tuple(x.contiguous() for x in saved)
    given = (vectors, lengths, kept, dy.contiguous(), dfinal.contiguous())
    dvectors, dcontrols, dinitial = run_backward(*given, num_controls=num_controls, unit=unit)
    return dvectors.view(projected.shape), dcontrols, dinitial


@_scan_projected_backward.register_fake
def _(
    projected: Tensor,
    lengths: Tensor | None,
    saved: list[Tensor],
    dy: Tensor,
    dfinal: Tensor,
    num_controls: int,
    unit: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dcontrols = projected.new_empty(*projected.shape[:2], num_controls)
    return projected.new_empty(projected.shape), dcontrols, dfinal.new_empty(dfinal.shape)


def _keep_scan(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    projected, controls, _, lengths, unit = inputs
    y, _, checkpoints, weights, inverses = output
    ctx.save_for_backward(projected, lengths, checkpoints, weights, y, inverses)
    ctx.num_controls, ctx.unit = controls.shape[-1], unit


def _differentiate_scan(ctx: Any, dy: Tensor, dfinal: Tensor, *_unused: Any) -> tuple[Any, ...]:
    projected, lengths, *saved = ctx.saved_tensors
    dprojected, dcontrols, dinitial = _scan_projected_backward(
        projected, lengths, saved, dy, dfinal, ctx.num_controls, ctx.unit
    )
    return dprojected, dcontrols, dinitial, None, None


scan_projected.register_autograd(_differentiate_scan, setup_context=_keep_scan)


@torch.library.custom_op("unimatrix::scan_chunks", mutates_args=())
def scan_chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    d: Tensor | None,
    log_retention: Tensor,
    rule_weights: Tensor | None,
    lengths: Tensor | None,
    initial: Tensor,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run Triton's scan of the matrix state; see ``matrix_state.triton.run_forward``."""
    from unimatrix.ops.matrix_state.reference import TokenInputs
    from unimatrix.ops.matrix_state.triton import run_forward

    tokens = TokenInputs(q, k, v, d, log_retention, rule_weights)
    return run_forward(tokens, initial, lengths, chunk_size)


@scan_chunks.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    d: Tensor | None,
    log_retention: Tensor,
    rule_weights: Tensor | None,
    lengths: Tensor | None,
    initial: Tensor,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    from unimatrix.ops.matrix_state.triton import count_chunks

    B, T, H, N = q.shape
    states = initial.new_empty(B, H, count_chunks(T, chunk_size), N, N)
    return q.new_empty(q.shape), initial.new_empty(initial.shape), states


@torch.library.custom_op("unimatrix::scan_chunks_backward", mutates_args=())
def _scan_chunks_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    d: Tensor | None,
    log_retention: Tensor,
    rule_weights: Tensor | None,
    lengths: Tensor | None,
    states: Tensor,
    dy: Tensor,
    dfinal: Tensor,
    chunk_size: int,
) -> list[Tensor]:
    from unimatrix.ops.matrix_state.reference import TokenInputs
    from unimatrix.ops.matrix_state.triton import run_backward

    tokens = TokenInputs(q, k, v, d, log_retention, rule_weights)
    dinitial, dtokens = run_backward(tokens, lengths, states, (dy, dfinal), chunk_size)
    return [dinitial, *(x for x in dtokens if x is not None)]


@_scan_chunks_backward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    d: Tensor | None,
    log_retention: Tensor,
    rule_weights: Tensor | None,
    lengths: Tensor | None,
    states: Tensor,
    dy: Tensor,
    dfinal: Tensor,
    chunk_size: int,
) -> list[Tensor]:
    given = (dfinal, q, k, v, d, log_retention, rule_weights)
    return [x.new_empty(x.shape) for x in given if x is not None]


def _keep_chunks(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tokens, lengths, _, ctx.chunk_size = inputs
    ctx.save_for_backward(*tokens, lengths, output[2])
    ctx.mark_non_differentiable(output[2])


def _differentiate_chunks(ctx: Any, dy: Tensor, dfinal: Tensor, _: Any) -> tuple[Any, ...]:
    *tokens, lengths, states = ctx.saved_tensors
    dinitial, *rest = _scan_chunks_backward(*tokens, lengths, states, dy, dfinal, ctx.chunk_size)
    found = iter(rest)
    dtokens = [None if x is None else next(found) for x in tokens]
    return *dtokens, None, dinitial, None


scan_chunks.register_autograd(_differentiate_chunks, setup_context=_keep_chunks)


@torch.library.custom_op("unimatrix::project", mutates_args=(), device_types="cpu")
def project(
    x: Tensor,
    recent: Tensor | None,
    row: Tensor,
    panels: Tensor,
    sizes: Sequence[int],
    eps: float,
    squashes: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run norm, convolution and projections; see ``PassWeights`` for what weights are."""
    from unimatrix.kernels.passes import projection_native as native

    weights = PassWeights(row, panels, tuple(sizes), eps)
    return native.run_forward(x.contiguous(), recent, weights, squashes=squashes)


@project.register_fake
def _(
    x: Tensor,
    recent: Tensor | None,
    row: Tensor,
    panels: Tensor,
    sizes: Sequence[int],
    eps: float,
    squashes: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _, columns, num_controls, *_ = sizes
    vectors, controls = (x.new_empty(*x.shape[:2], size) for size in (columns, num_controls))
    return x.new_empty(x.shape), vectors, controls


@torch.library.custom_op("unimatrix::project_backward", mutates_args=(), device_types="cpu")
def _project_backward(
    x: Tensor,
    recent: Tensor | None,
    row: Tensor,
    panels: Tensor,
    sizes: Sequence[int],
    eps: float,
    vectors: Tensor,
    grads: Sequence[Tensor],
    squashes: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from unimatrix.kernels.passes import projection_native as native

    weights = PassWeights(row, panels, tuple(sizes), eps)
    elsewhere = x.new_empty(0)  # the stream's own gradient, which the graph adds
    given = (x.contiguous(), recent, weights, vectors, (elsewhere, *grads))
    return native.run_backward(*given, squashes=squashes)


@_project_backward.register_fake
def _(
    x: Tensor,
    recent: Tensor | None,
    row: Tensor,
    panels: Tensor,
    sizes: Sequence[int],
    eps: float,
    vectors: Tensor,
    grads: Sequence[Tensor],
    squashes: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    num_before = max(sizes[3] - 1, 0)
    before = x.new_empty(x.shape[0], num_before, x.shape[2])
    return x.new_empty(x.shape), before, row.new_empty(row.shape)


def _keep_projections(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, recent, row, panels, *ctx.rest, ctx.squashes = inputs
    ctx.save_for_backward(x, recent, row, panels, output[1])


def _differentiate_projections(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    *given, vectors = ctx.saved_tensors
    dx, drecent, drow = _project_backward(*given, *ctx.rest, vectors, list(grads), ctx.squashes)
    recent = given[1]
    return dx, None if recent is None else drecent.to(recent.dtype), drow, None, None, None, None


project.register_autograd(_differentiate_projections, setup_context=_keep_projections)


@torch.library.custom_op("unimatrix::add_mixed", mutates_args=(), device_types="cpu")
def add_mixed(
    x: Tensor,
    h: Tensor,
    contexts: Sequence[Tensor],
    row: Tensor,
    panels: Tensor,
    sizes: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Run projection, gates and gated sum; see ``PassWeights`` for what weights are."""
    from unimatrix.kernels.passes import mixing_native as native

    readout, *others = (context.contiguous() for context in contexts)
    weights = PassWeights(row, panels, tuple(sizes))
    return native.run_forward(x.contiguous(), h.contiguous(), readout, others, weights, saves=True)


@add_mixed.register_fake
def _(
    x: Tensor,
    h: Tensor,
    contexts: Sequence[Tensor],
    row: Tensor,
    panels: Tensor,
    sizes: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    width, _, num_gates = sizes
    num_rows = x.numel() // width
    gates = x.new_empty(num_rows, num_gates * width)
    return x.new_empty(x.shape), gates, x.new_empty(num_rows, width)


@torch.library.custom_op("unimatrix::add_mixed_backward", mutates_args=(), device_types="cpu")
def _add_mixed_backward(
    h: Tensor,
    contexts: Sequence[Tensor],
    kept: Sequence[Tensor],
    row: Tensor,
    panels: Tensor,
    sizes: Sequence[int],
    dy: Tensor,
) -> list[Tensor]:
    from unimatrix.kernels.passes import mixing_native as native

    readout, *others = (context.contiguous() for context in contexts)
    weights = PassWeights(row, panels, tuple(sizes))
    dh, dreadout, dothers, drow = native.run_backward(
        h.contiguous(), readout, others, kept, weights, dy
    )
    return [dh, dreadout, *dothers, drow]


@_add_mixed_backward.register_fake
def _(
    h: Tensor,
    contexts: Sequence[Tensor],
    kept: Sequence[Tensor],
    row: Tensor,
    panels: Tensor,
    sizes: Sequence[int],
    dy: Tensor,
) -> list[Tensor]:
    return [h.new_empty(made.shape) for made in (h, *contexts, row)]


def _keep_mixing(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, h, contexts, row, panels, ctx.sizes = inputs
    ctx.save_for_backward(h, row, panels, *output[1:], *contexts)


def _differentiate_mixing(ctx: Any, dy: Tensor, *_unused: Any) -> tuple[Any, ...]:
    h, row, panels, gates, projected, *contexts = ctx.saved_tensors
    dh, *dcontexts, drow = _add_mixed_backward(
        h, contexts, [gates, projected], row, panels, ctx.sizes, dy
    )
    return dy, dh, dcontexts, drow, None, None


add_mixed.register_autograd(_differentiate_mixing, setup_context=_keep_mixing)


@torch.library.custom_op("unimatrix::add_feed_forward", mutates_args=(), device_types="cpu")
def add_feed_forward(
    x: Tensor, row: Tensor, panels: Tensor, sizes: Sequence[int], eps: float
) -> tuple[Tensor, Tensor]:
    """Run norm and feed-forward network; see ``PassWeights`` for what weights are."""
    from unimatrix.kernels.passes import feed_forward_native as native

    weights = PassWeights(row, panels, tuple(sizes), eps)
    return native.run_forward(x.contiguous(), weights, saves=True)


@add_feed_forward.register_fake
def _(
    x: Tensor, row: Tensor, panels: Tensor, sizes: Sequence[int], eps: float
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.numel() // x.shape[-1], sizes[-1])


@torch.library.custom_op("unimatrix::feed_forward_backward", mutates_args=(), device_types="cpu")
def _feed_forward_backward(
    x: Tensor,
    kept: Tensor,
    row: Tensor,
    panels: Tensor,
    sizes: Sequence[int],
    eps: float,
    dy: Tensor,
) -> tuple[Tensor, Tensor]:
    from unimatrix.kernels.passes import feed_forward_native as native

    weights = PassWeights(row, panels, tuple(sizes), eps)
    return native.run_backward(x.contiguous(), kept, weights, dy)


@_feed_forward_backward.register_fake
def _(
    x: Tensor,
    kept: Tensor,
    row: Tensor,
    panels: Tensor,
    sizes: Sequence[int],
    eps: float,
    dy: Tensor,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), row.new_empty(row.shape)


def _keep_feed_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, row, panels, *ctx.rest = inputs
    ctx.save_for_backward(x, output[1], row, panels)


def _differentiate_feed_forward(ctx: Any, dy: Tensor, _unused: Any) -> tuple[Any, ...]:
    dx, drow = _feed_forward_backward(*ctx.saved_tensors, *ctx.rest, dy)
    return dx, drow, None, None, None


add_feed_forward.register_autograd(_differentiate_feed_forward, setup_context=_keep_feed_forward)


@torch.library.custom_op("unimatrix::sum_cross_entropy", mutates_args=(), device_types="cpu")
def sum_cross_entropy(
    h: Tensor,
    row: Tensor,
    panels: Tensor,
    sizes: Sequence[int],
    targets: Tensor,
    token_ids: Tensor | None,
    shares: Tensor | None,
    ignored: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run head and loss; see ``PassWeights`` and ``head_native.run_head``."""
    from unimatrix.kernels.passes import head_native as native

    shares = None if shares is None else shares.contiguous()
    weights = PassWeights(row, panels, tuple(sizes))
    given = h.contiguous(), weights, targets, token_ids, shares
    return native.run_head(*given, ignored=ignored, saves=True)


@sum_cross_entropy.register_fake
def _(
    h: Tensor,
    row: Tensor,
    panels: Tensor,
    sizes: Sequence[int],
    targets: Tensor,
    token_ids: Tensor | None,
    shares: Tensor | None,
    ignored: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dshares = h.new_empty(0 if shares is None else shares.shape)
    return h.new_empty(()), h.new_empty(h.shape), row.new_empty(row.shape), dshares


def _keep_head(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, dh, drow, dshares = output
    ctx.save_for_backward(dh, drow, dshares)
    ctx.has_shares = inputs[6] is not None
    ctx.mark_non_differentiable(dh, drow, dshares)


def _differentiate_head(ctx: Any, dtotal: Tensor, *_unused: Any) -> tuple[Any, ...]:
    dh, drow, dshares = ctx.saved_tensors
    of_shares = dtotal * dshares if ctx.has_shares else None
    return dtotal * dh, dtotal * drow, None, None, None, None, of_shares, None


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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Decide reads and writes of slots; see ``slots.native.allocate_native``, or Triton's."""
    from unimatrix.ops.slots.scan import find_allocator
    from unimatrix.ops.slots.slot_state import SlotRules

    rules = SlotRules(slots_per_read, match_threshold, strength_floor)
    chosen, writers, ages = find_allocator(backend)(
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    chosen = initial_ages.new_empty(*queries.shape[:2], slots_per_read)
    held = initial_ages.shape
    return chosen, initial_ages.new_empty(held), initial_ages.new_empty(held)


@torch.library.custom_op("unimatrix::scan_selective_slots", mutates_args=())
def scan_selective_slots(
    writes: list[Tensor], initial: list[Tensor], bounded: bool, rules: list[int], backend: str
) -> list[Tensor]:
    """Run selective slots; see the operator of that name.

    Args:
        writes: fields of ``SlotWrites``.
        initial: fields of ``SelectiveSlots``.
        bounded: as in ``SlotPolicy``.
        rules: margin, keep_first and fade_tokens of ``SlotPolicy``.
        backend: ``native``, on the CPU and back, or ``triton``.

    Returns:
        the fields of the lookup, of the slots afterwards, and writers; the last four mean nothing
        without a bound.
    """
    from unimatrix.ops.selective_slots.scan import run_scan
    from unimatrix.ops.selective_slots.state import SelectiveSlots, SlotPolicy, SlotWrites

    margin, keep_first, fade_tokens = rules
    policy = SlotPolicy(bounded, margin, bool(keep_first), fade_tokens)
    lookup, slots, writers = run_scan(
        backend, SlotWrites(*writes), SelectiveSlots(*initial), policy
    )
    if slots is None or writers is None:
        slots = SelectiveSlots(*(x.new_empty(x.shape) for x in initial))
        writers = initial[0].new_empty(initial[0].shape, dtype=torch.int64)
    return [x.contiguous() for x in (*lookup, *slots, writers)]


@scan_selective_slots.register_fake
def _(
    writes: list[Tensor], initial: list[Tensor], bounded: bool, rules: list[int], backend: str
) -> list[Tensor]:
    found = [writes[0].new_empty(writes[0].shape) for _ in range(3)]
    slots = [x.new_empty(x.shape) for x in initial]
    return [*found, *slots, initial[0].new_empty(initial[0].shape, dtype=torch.int64)]


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
