"""Which parts of a model run compiled, and why the others do not.

A plan holds, for every part, the module itself or a callable with the module's signature. It is
made anew in each forward pass, so a hook, an adapter or another device counts from then on.
"""

from collections.abc import Callable, Mapping
from functools import partial
from logging import INFO
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.utils import logging

from unimatrix.errors import InputError
from unimatrix.kernels.block import BlockRun, build_block_run, build_norm_run
from unimatrix.kernels.explain import Form, explain_layers, explain_module, explain_sizes
from unimatrix.kernels.selective import SelectiveRun
from unimatrix.kernels.step.explain import explain_step
from unimatrix.loss import IGNORED_LABEL, compute_loss, count_targets
from unimatrix.nn.block import UniMatrixBlock
from unimatrix.nn.mixer import Tokens
from unimatrix.nn.pointer_mixture import NUM_LENGTH_BUCKETS, Pointer, PointerMixture, point
from unimatrix.nn.residual_context import ResidualContext, ResidualRead
from unimatrix.nn.selective_mixer import SelectiveMixer, SelectiveRead
from unimatrix.ops.backends import compiles_native, require_backend
from unimatrix.ops.checks import is_autocast, is_transformed

_logger = logging.get_logger(__name__)
# Positions below which torch is as fast as a pass and needs no compiler.
_FEWEST_ROWS = 17
# Weights of one pass above which a library's products are as fast.
_MOST_WEIGHTS = 600_000
_JOINED = "torch.compile joins its operations"


class Run(NamedTuple):
    """What a forward pass calls.

    Attributes:
        embed: from ids [...] to embeddings [..., D].
        block: as ``UniMatrixBlock.forward``.
        norm: the last norm.
        pointer: as ``PointerMixture.forward``; ``None`` without one.
        mixers: as ``Mixer.forward``, by the name of each mixer that reads once.
        reasons: by part, why its module is called; a part that runs compiled has none.
    """

    embed: Callable[[Tensor], Tensor]
    block: UniMatrixBlock | BlockRun
    norm: Callable[[Tensor], Tensor]
    pointer: Any
    mixers: dict[str, Callable[..., tuple[Any, Any]]]
    reasons: dict[str, str]


def plan(model: Any, *, like: Tensor) -> Run:
    """Return what runs each part of a model in a forward pass.

    Args:
        model: a ``UniMatrixModel``.
        like: [B, T], the token ids.

    Raises:
        InputError: if compiled passes are asked for by name and cannot run.
    """
    embed, block = model.embed_tokens, model.block
    norm, mixture = model.norm, model.pointer_mixture
    mixers: dict[str, Any] = {m.name: m for m in model.mixers if m.reads_at is not None}
    weight: Any = getattr(embed, "weight", None)
    reason: str | None = "embed_tokens has no weight"
    if weight is not None:
        reason = _explain_call(model.passes_backend, weight, like.numel())
    if reason is not None:
        _log({"all parts": reason})
        return Run(embed, block, norm, mixture, mixers, {"all parts": reason})
    reasons: dict[str, str] = {}
    is_forced = model.passes_backend == "native"
    most_weights = float("inf") if is_forced else _MOST_WEIGHTS
    run_block = _plan_block(block, weight, like.shape[1], most_weights, reasons)
    _plan_mixers(mixers, embed, weight, like.numel(), reasons)
    run = Run(
        embed=_plan_embedding("embed_tokens", embed, weight, like.numel(), reasons) or embed,
        block=run_block,
        norm=build_norm_run(norm, "norm", weight, reasons),
        pointer=None if mixture is None else _plan_pointer(mixture, weight, reasons),
        mixers=mixers,
        reasons=reasons,
    )
    _log(reasons)
    return run


def _log(reasons: dict[str, str]) -> None:
    """Say once of each part why its module is called."""
    if not torch.compiler.is_compiling() and _logger.isEnabledFor(INFO):
        for part, reason in reasons.items():
            _logger.info_once(f"{part} does not run compiled: {reason}")


def _explain_call(backend: str, weight: Tensor, num_rows: int) -> str | None:
    """Return why no compiled pass may run in this call, ``None`` if one may.

    Raises:
        InputError: if there is no such back end, or ``native`` is asked for and cannot run.
    """
    if backend == "reference":
        return "the back end 'reference' was chosen"
    is_able = weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.float64)
    kind = "" if is_able else f"{str(weight.dtype).removeprefix('torch.')} on {weight.device.type}"
    if backend != "auto" and require_backend("fused_passes", backend) == "native":
        if not is_able:
            raise InputError(
                f"backend 'native' takes float32 or float64 on the CPU, not {kind}; pass auto."
            )
        num_rows = _FEWEST_ROWS
    if not is_able:
        return f"the model is {kind}"
    if is_autocast("cpu"):
        return "autocast is on"
    if backend == "auto" and is_transformed():
        return "a transform of torch.func is on"
    if _has_any_global_hook():  # type: ignore[no-untyped-call]
        return "a hook on every module is set"
    if num_rows < _FEWEST_ROWS:
        return f"{num_rows} positions are fewer than {_FEWEST_ROWS}"
    if backend == "auto" and not compiles_native():
        return "compiled kernels failed their check in this process"
    return None


def explain_plan(model: Any, num_tokens: int) -> dict[str, str]:
    """Return by part why a ``UniMatrixForCausalLM`` does not run compiled; empty if all does.

    Args:
        model: as it is now: its mode, device, type, hooks and back ends count.
        num_tokens: of the forward pass in question; 1 is decoding, in ``generate`` or a
            ``Decoder``.
    """
    if num_tokens == 1:
        reason = explain_step(model)
        return {} if reason is None else {"decode step": reason}
    ids = torch.zeros(1, num_tokens, dtype=torch.int64, device=model.device)
    reasons = plan(model.model, like=ids).reasons
    if "all parts" in reasons:
        return reasons
    h = model.lm_head.weight[:1].detach().expand(num_tokens, -1)
    reason = plan_loss(model, like=h).reason
    return reasons if reason is None else reasons | {"loss": reason}


def _plan_block(
    block: nn.Module, like: Tensor, num_tokens: int, most_weights: float, reasons: dict[str, str]
) -> Any:
    """Return what runs the block, and add the reasons."""
    reason = explain_module("block", block)
    if type(block) is not UniMatrixBlock:
        reason = f"block is a {type(block).__name__}"
    elif block.gradient_checkpointing and block.training:
        reason = "block is computed again in the backward pass"
    if reason is None:
        return build_block_run(block, like, num_tokens, most_weights, reasons)  # type: ignore[arg-type]
    reasons["block"] = reason
    return block


def _plan_embedding(
    name: str,
    embed: nn.Module,
    like: Tensor,
    num_ids: int,
    reasons: dict[str, str],
    *,
    allows_none: bool = False,
) -> Callable[..., Tensor] | None:
    """Return an embedding as one pass, ``None`` with the reason.

    With ``allows_none``, -1 stands for no token, whose embedding is zero.
    """
    num_rows = getattr(embed, "num_embeddings", 0)
    reason = explain_layers({name: Form(embed, (num_rows, like.shape[-1]), False)}, like)
    if reason is None and isinstance(embed, nn.Embedding):
        if embed.padding_idx is not None or embed.max_norm is not None:
            reason = f"{name} has a padding_idx or max_norm"
        elif embed.sparse or embed.scale_grad_by_freq:
            reason = f"{name} has sparse or scaled gradients"
        elif embed.num_embeddings > num_ids:
            reason = f"{name} has more rows than the call has tokens"
    if reason is None and torch.compiler.is_compiling():
        reason = _JOINED
    if reason is not None:
        reasons[name] = reason
        return None
    # Imported here: it loads the compiler.
    from unimatrix.kernels.passes.embedding_native import embed_tokens_native

    table: Any = embed.weight
    return lambda ids: embed_tokens_native(ids, table, allows_none=allows_none)


def _plan_mixers(
    mixers: dict[str, Any], embed: nn.Module, like: Tensor, num_ids: int, reasons: dict[str, str]
) -> None:
    """Put compiled ones in the place of mixers that read once, and add the reasons."""
    residual = mixers.get(ResidualContext.name)
    if residual is not None:
        name = ResidualContext.name
        reason = explain_module(name, residual, ResidualContext)
        table = None
        if reason is None:
            part = f"{name}.embed"
            table = _plan_embedding(part, residual.embed, like, num_ids, reasons, allows_none=True)
        else:
            reasons[name] = reason
        if table is not None:
            mixers[name] = partial(_read_residual, residual, table)
    selective = mixers.get(SelectiveMixer.name)
    if selective is not None:
        reason = explain_selective(selective, embed, like, num_ids)
        if reason is None:
            backend = selective.operator_options.get("backend", "auto")
            compiles = backend in ("auto", "native") and not torch.compiler.is_compiling()
            mixers[SelectiveMixer.name] = SelectiveRun(selective, like, compiles)
        else:
            reasons[SelectiveMixer.name] = reason


def _read_residual(
    mixer: ResidualContext, embed: Callable[[Tensor], Tensor], _: Tensor, tokens: Tokens, state: Any
) -> tuple[ResidualRead, Any]:
    """Read the residual context with its embeddings in one pass; as ``ResidualContext.forward``."""
    predicted, lengths, state = mixer.predict(tokens, state)
    return ResidualRead(embed(predicted), predicted, lengths), state


def explain_selective(
    mixer: SelectiveMixer, embed: nn.Module, like: Tensor, num_ids: int
) -> str | None:
    """Return why selective slots cannot read from a table of the vocabulary.

    In less than 32 bits a sum of two products would keep fewer digits than one product of both.
    """
    V, D = like.shape
    inputs = (3 if mixer.reads_at else 2) * D
    forms = {
        "embed_tokens": Form(embed, (V, D), False),
        "selective_mixer.gate_up": Form(mixer.gate_up, (D // 2, inputs), True),
        "selective_mixer.gate_down": Form(mixer.gate_down, (len(mixer.patterns), D // 2), True),
        "selective_mixer.value_proj": Form(mixer.value_proj, (D, D), False),
    }
    reason = explain_module("selective_mixer", mixer, SelectiveMixer)
    reason = reason or explain_layers(forms, like)
    if reason is None and num_ids < V:
        reason = "the vocabulary has more tokens than the call"
    return reason


def _plan_pointer(mixture: Any, like: Tensor, reasons: dict[str, str]) -> Any:
    """Return what runs the pointer mixture, and add the reason."""
    reason = explain_module("pointer_mixture", mixture, PointerMixture)
    if mixture.head_score is not None:
        reason = "heads of the indexed attention share in it"
    D = like.shape[-1]
    shapes = {"slot_score": (mixture.num_reads, D), "automaton_score": (1, D)}
    shapes["length_score"] = (NUM_LENGTH_BUCKETS, 1)
    forms = {
        f"pointer_mixture.{n}": Form(getattr(mixture, n), shape, n != "length_score")
        for n, shape in shapes.items()
        if getattr(mixture, n) is not None
    }
    reason = reason or explain_layers(forms, like)
    if reason is None and torch.compiler.is_compiling():
        reason = _JOINED
    if reason is not None:
        reasons["pointer_mixture"] = reason
        return mixture
    return partial(_weigh_retrieved, mixture)


def _weigh_retrieved(
    mixture: PointerMixture, h: Tensor, reads: Mapping[str, Any], targets: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Weigh retrieved tokens in one pass; as ``PointerMixture.forward``, without heads."""
    # Imported here: it loads the compiler.
    from unimatrix.kernels.passes.pointer_native import (
        FoundInSlots,
        FoundMatch,
        weigh_retrieved_native,
    )

    slots, matched = None, None
    score = mixture.slot_score
    if score is not None:
        found: SelectiveRead = reads[SelectiveMixer.name]
        read = (found.token_ids, found.log_strength, found.probe)
        slots = FoundInSlots(score.weight, score.bias, *read)
    score, by_length = mixture.automaton_score, mixture.length_score
    if score is not None and by_length is not None:
        match: ResidualRead = reads[ResidualContext.name]
        assert match.match_lengths is not None
        lengths = by_length.weight.flatten()
        predicted = (match.predicted_ids, match.match_lengths)
        matched = FoundMatch(score.weight, score.bias, lengths, *predicted)
    return weigh_retrieved_native(h, slots, matched)


class LossRun(NamedTuple):
    """Head and loss, composed or as one pass.

    Attributes:
        head: the output head.
        weights: of the pass, from ``prepare_head``; ``None`` composes.
        reason: why it composes.
    """

    head: nn.Module
    weights: Any
    reason: str | None

    def __call__(
        self,
        h: Tensor,
        pointer: Pointer,
        targets: Tensor,
        num_items_in_batch: Tensor | int | None = None,
        target_weights: Tensor | None = None,
    ) -> Tensor:
        """Return the mean cross entropy in nats of hidden states [..., D] and targets [...].

        The arguments are those of ``point`` and ``compute_loss``.
        """
        if self.weights is None:
            predicted = point(self.head(h), pointer)
            return compute_loss(predicted, targets, num_items_in_batch, target_weights)
        # Imported here: it loads the compiler.
        from unimatrix.kernels.passes.head_native import sum_cross_entropy_native

        shares = pointer.votes if pointer.log_weights is None else pointer.log_weights
        shares = None if shares is None else shares.to(h.dtype)
        counted = None if target_weights is None else target_weights.to(h.dtype)
        others = (targets, pointer.token_ids, shares, counted)
        total = sum_cross_entropy_native(h, self.weights, *others, ignored=IGNORED_LABEL)
        if num_items_in_batch is None:
            return total / count_targets(targets, target_weights)
        return total / num_items_in_batch


def plan_loss(model: Any, *, like: Tensor) -> LossRun:
    """Return what computes the loss of a ``UniMatrixForCausalLM``.

    Args:
        model: whose head it is.
        like: [..., D], what the head reads.
    """
    head, backend = model.lm_head, model.base_model.passes_backend
    reason = _explain_call(backend, like, like.shape[:-1].numel())
    form = Form(head, (model.config.vocab_size, like.shape[-1]), False)
    reason = reason or explain_layers({"lm_head": form}, like)
    if reason is None:
        most_weights = float("inf") if backend == "native" else _MOST_WEIGHTS
        reason = explain_sizes("the pass", [head.weight], most_weights, (like.shape[-1],))
    if reason is not None:
        _log({"loss": reason})
        return LossRun(head, None, reason)
    # Imported here: it loads the compiler.
    from unimatrix.kernels.passes.head_native import prepare_head

    return LossRun(head, prepare_head(head.weight), None)
