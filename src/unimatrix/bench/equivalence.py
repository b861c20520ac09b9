"""No operator is timed before its fast back end has met its reference, at the sizes to be timed."""

from collections.abc import Callable, Mapping
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


def check_model(
    spec: BenchModel, *, seed: int, device: str, backends: Mapping[str, str] | None = None
) -> list[Check]:
    """Compare every fast back end that a model would use with the reference, one at a time.

    Logits and the gradient of the loss are those of the whole model, in float32 and in what is to
    be timed, once with the fast back end everywhere and once with the reference in one operator.
    Then single steps through the cache, and the bytes that ``generate`` chooses, are compared with
    full passes, in float32.

    Args:
        spec: a preset at the sizes to be timed.
        seed: of the weights.
        device: cpu, cuda or mps.
        backends: the back end of each operator; ``None`` is what the model chooses.

    Raises:
        EquivalenceError: if one differs by more than its limit.
    """
    model = spec.build(max_tokens=_TOKENS + _NEW_TOKENS, seed=seed, device=device).eval()
    assert isinstance(model, UniMatrixForCausalLM)
    _strengthen(model, seed)
    ids = _draw_repetitive_ids(model.config.vocab_size).to(device)
    fast = dict(backends or model.name_backends(_TOKENS))
    checks = []
    for precision in dict.fromkeys(("float32", spec.precision)):
        cast = replace(spec, precision=precision)
        # Under autocast a model may choose others.
        used = fast if precision == "float32" else dict.fromkeys(fast, "auto")
        model.set_backend(used)
        found = _differentiate(cast, model, ids)
        for op, backend in used.items():
            if backend == "reference":
                continue
            model.set_backend({**used, op: "reference"})
            error = max(map(_measure, found, _differentiate(cast, model, ids)))
            names = {"model": spec.name, "op": op, "backend": backend, "precision": precision}
            checks.append(Check(**names, error=error))
    model.set_backend(dict.fromkeys(fast, "auto"))
    error = _compare_decoding(replace(spec, precision="float32"), model, ids[:1])
    checks.append(
        Check(model=spec.name, op=_DECODING, backend="cache", precision="float32", error=error)
    )
    for check in checks:
        _require_small(check)
    return checks


def check_compiled(spec: BenchModel, *, seed: int, device: str) -> list[Check]:
    """Compare loss and gradients of a compiled train step with those of eager execution.

    In float32 and in what is to be timed.

    Args:
        spec: a preset with a compiler.
        seed: of the weights.
        device: cpu, cuda or mps.

    Raises:
        EquivalenceError: if one differs by more than its limit.
    """
    assert spec.compiler is not None
    model = spec.build(max_tokens=_TOKENS, seed=seed, device=device).train()
    assert isinstance(model, UniMatrixForCausalLM)
    _strengthen(model, seed)
    ids = _draw_repetitive_ids(model.config.vocab_size).to(device)
    checks = []
    for precision in dict.fromkeys(("float32", spec.precision)):
        cast = replace(spec, precision=precision)
        expected = _differentiate_loss(cast, model, model, ids)
        found = _differentiate_loss(cast, model, compile_step(spec, model), ids)
        error = max(map(_measure, found, expected))
        names = {"model": spec.label, "op": _STEP, "backend": spec.compiler}
        checks.append(Check(**names, precision=precision, error=error))
        _require_small(checks[-1])
    return checks


def _require_small(check: Check) -> None:
    """Raise ``EquivalenceError`` unless the error is within the limit; NaN is not."""
    limit = LIMITS[check.precision]
    if check.error <= limit:
        return
    subjects = {_DECODING: "a full pass", _STEP: "eager execution"}
    subject = subjects.get(check.op, f"the reference back end of {check.op}")
    raise EquivalenceError(
        f"{check.model}: {check.op} ({check.backend}) differs from {subject} by "
        f"{check.error:.1e} of the largest number, more than {limit:.0e}; it is not timed"
    )


@torch.no_grad()
def _strengthen(model: UniMatrixForCausalLM, seed: int) -> None:
    """Draw weights at which every part moves the output; fresh ones leave most of it to a few."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            drawn = torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5
            parameter.copy_(drawn)


def _draw_repetitive_ids(vocab_size: int) -> Tensor:
    """Return [B, T] ids that repeat, so that slots and automaton find something."""
    phrase = b"the key is 4711, the key is 47"
    text = (phrase * (1 + _ROWS * _TOKENS // len(phrase)))[: _ROWS * _TOKENS]
    return cut_rows(text, _ROWS, _TOKENS, vocab_size)


def _differentiate(
    spec: BenchModel, model: UniMatrixForCausalLM, ids: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the logits, and the loss's gradient in all parameters as one vector."""
    model.zero_grad(set_to_none=True)
    with spec.cast_products(ids.device):
        output = model(input_ids=ids, labels=ids, use_cache=False)
    assert output.loss is not None
    output.loss.backward()
    return output.logits.detach(), _take_gradients(model)


def _differentiate_loss(
    spec: BenchModel, model: UniMatrixForCausalLM, call: Callable[..., Any], ids: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the loss of a train step, and its gradient in all parameters as one vector."""
    model.zero_grad(set_to_none=True)
    with spec.cast_products(ids.device):
        loss = call(input_ids=ids, labels=ids, use_cache=False, loss_only=True).loss
    loss.backward()
    return loss.detach(), _take_gradients(model)


def _take_gradients(model: UniMatrixForCausalLM) -> Tensor:
    """Return all gradients as one vector, and leave none."""
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return torch.cat(gradients)


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
