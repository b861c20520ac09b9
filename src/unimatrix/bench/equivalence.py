"""No operator is timed before its fast back end has met its reference, at the sizes to be timed."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from unimatrix.bench.models import BenchModel
from unimatrix.bench.workloads import compile_step, cut_rows, prefill, step_once
from unimatrix.modeling import UniMatrixForCausalLM

LIMITS = {"float32": 1e-4, "bfloat16": 1 / 8}
"""Largest error by precision, as a share of the largest number compared.

In bfloat16 all that goes into an operator is rounded to 8 binary digits, by the reference too, and
three depth steps add to it: 0.07 was seen. The limit is for what is wrong altogether.
"""
_ROWS, _TOKENS, _NEW_TOKENS = 2, 33, 4
_DECODING = "decoding"
_STEP = "train step"


class EquivalenceError(RuntimeError):
    """A fast path that does not compute what its reference does."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """How far a fast path was from its reference.

    Attributes:
        model: the preset.
        op: the operator, ``decoding`` or ``train step``.
        backend: what was compared with the reference, or with eager execution.
        precision: of matrix products.
        error: largest difference of logits and of gradients, as a share of the largest of them.
    """

    model: str
    op: str
    backend: str
    precision: str
    error: float


def check_model(spec: BenchModel, *, seed: int, device: str) -> list[Check]:
    """Compare every fast back end that a model would use with the reference, one at a time.

    Logits and the gradient of the loss are those of the whole model, in float32 and in what is to
    be timed, once with the fast back end everywhere and once with the reference in one operator.
    Then single steps through the cache, and the bytes that ``generate`` chooses, are compared with
    full passes, in float32.

    Raises:
        EquivalenceError: if one differs by more than its limit.
    """
    model, ids = _build(spec, _TOKENS + _NEW_TOKENS, seed, device)
    fast = model.eval().name_backends(_TOKENS)
    checks = []
    for precision in _list_precisions(spec):
        cast = replace(spec, precision=precision)
        # Under autocast a model may choose others.
        used = fast if precision == "float32" else dict.fromkeys(fast, "auto")
        model.set_backend(used)
        found = _differentiate(cast, model, model, ids)
        for op, backend in used.items():
            if backend == "reference":
                continue
            model.set_backend({**used, op: "reference"})
            error = max(map(_measure, found, _differentiate(cast, model, model, ids)))
            names = {"model": spec.name, "op": op, "backend": backend, "precision": precision}
            checks.append(Check(**names, error=error))
    model.set_backend(dict.fromkeys(fast, "auto"))
    error = _compare_decoding(replace(spec, precision="float32"), model, ids[:1])
    names = {"model": spec.name, "op": _DECODING, "backend": "cache", "precision": "float32"}
    return _require_small([*checks, Check(**names, error=error)])


def check_compiled(spec: BenchModel, *, seed: int, device: str) -> list[Check]:
    """Compare loss and gradients of a compiled train step with those of eager execution.

    In float32 and in what is to be timed; the preset has a compiler.

    Raises:
        EquivalenceError: if one differs by more than its limit.
    """
    assert spec.compiler is not None
    model, ids = _build(spec, _TOKENS, seed, device)
    model.train()
    checks = []
    for precision in _list_precisions(spec):
        cast = replace(spec, precision=precision)
        expected = _differentiate(cast, model, model, ids, loss_only=True)
        found = _differentiate(cast, model, compile_step(spec, model), ids, loss_only=True)
        error = max(map(_measure, found, expected))
        names = {"model": spec.label, "op": _STEP, "backend": spec.compiler}
        checks += _require_small([Check(**names, precision=precision, error=error)])
    return checks


def _list_precisions(spec: BenchModel) -> tuple[str, ...]:
    """Return float32 and the precision that is timed, once each."""
    return tuple(dict.fromkeys(("float32", spec.precision)))


def _require_small(checks: list[Check]) -> list[Check]:
    """Return the checks, or raise for one whose error passes the limit or is NaN."""
    for check in checks:
        limit = LIMITS[check.precision]
        if not check.error <= limit:
            subjects = {_DECODING: "a full pass", _STEP: "eager execution"}
            subject = subjects.get(check.op, f"the reference back end of {check.op}")
            raise EquivalenceError(
                f"{check.model}: {check.op} ({check.backend}) differs from {subject} by "
                f"{check.error:.1e} of the largest number, more than {limit:.0e}; it is not timed"
            )
    return checks


@torch.no_grad()
def _build(
    spec: BenchModel, max_tokens: int, seed: int, device: str
) -> tuple[UniMatrixForCausalLM, Tensor]:
    """Return a model, and ids [B, T] that repeat, so that slots and automaton find something.

    Its matrices are drawn so that every part moves the output, which fresh weights leave to few.
    """
    model = spec.build(max_tokens=max_tokens, seed=seed, device=device)
    assert isinstance(model, UniMatrixForCausalLM)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            drawn = torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5
            parameter.copy_(drawn)
    phrase = b"the key is 4711, the key is 47"
    text = phrase * (1 + _ROWS * _TOKENS // len(phrase))
    return model, cut_rows(text, _ROWS, _TOKENS, model.config.vocab_size).to(device)


def _differentiate(
    spec: BenchModel,
    model: UniMatrixForCausalLM,
    call: Callable[..., Any],
    ids: Tensor,
    *,
    loss_only: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return logits, or the loss alone, and the loss's gradient in all parameters as one vector."""
    model.zero_grad(set_to_none=True)
    with spec.cast_products(ids.device):
        output = call(input_ids=ids, labels=ids, use_cache=False, loss_only=loss_only)
    output.loss.backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    compared = output.loss if loss_only else output.logits
    return compared.detach(), torch.cat(gradients)


@torch.no_grad()
def _compare_decoding(spec: BenchModel, model: UniMatrixForCausalLM, ids: Tensor) -> float:
    """Return how far cached steps and the choices of ``generate`` are from full passes."""
    half = ids.shape[1] // 2
    carried, stepped = prefill(spec, model, ids[:, : half + 1]), []
    for t in range(half, ids.shape[1]):
        token = ids[:, t : t + 1]
        output = model(input_ids=token, past_key_values=carried, use_cache=True)
        stepped.append(output.logits[:, -1])
        carried = step_once(spec, model, token, carried)
    full = model(input_ids=ids, use_cache=False).logits
    error = _measure(torch.stack(stepped, dim=1), full[:, half:])
    written = model.generate(
        ids, past_key_values=prefill(spec, model, ids), do_sample=False, max_new_tokens=_NEW_TOKENS
    )
    logits = model(input_ids=written[:, :-1], use_cache=False).logits[:, ids.shape[1] - 1 :]
    chosen = logits.gather(-1, written[:, ids.shape[1] :].unsqueeze(-1)).squeeze(-1)
    # A tie may fall either way; what counts is that no better byte was passed over.
    return max(error, _measure(chosen, logits.max(dim=-1).values))


def _measure(actual: Tensor, expected: Tensor) -> float:
    """Return the largest difference as a share of the largest number; infinite for NaN."""
    difference = (actual.double() - expected.double()).abs().max().item()
    scale = expected.double().abs().max().item()
    if difference != difference:
        return float("inf")
    return difference / scale if scale > 0 else difference
