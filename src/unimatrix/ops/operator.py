"""One declaration of an operator: eagerly a plain call, in a captured graph a single node.

``torch.compile`` cannot look into compiled loops, a hash table or an automaton. It takes an
operator whole if torch knows the shapes of the results and the derivative. Eagerly, torch's
dispatcher would cost as much as some of the loops, so the functions are then called as they are.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from unimatrix.errors import InputError
from unimatrix.ops.checks import is_transformed

Function = Callable[..., Any]


def declare_operator(
    name: str,
    forward: Function,
    *,
    backward: Function | None = None,
    results: str = "result",
    saved: str = "",
    gradients: str = "",
    residual: str = "",
    shapes: Function | None = None,
    gradient_shapes: Function | None = None,
    devices: str | None = "cpu",
) -> Function:
    """Return one function for eager execution and for graphs.

    Args:
        name: under ``torch.ops.unimatrix``.
        forward: takes the operator's inputs by position, and returns what ``results`` and ``saved``
            name: one tensor, or a tuple of several. A keyword ``saves``, if it has one, says
            whether the tensors of ``saved`` are needed; other keywords are for other callers.
        backward: takes the tensors and then the numbers that it needs, its parameters named as the
            inputs, results and saved tensors are; and last the gradients of all results, zeros for
            those that the loss does not depend on (``None``, if annotated ``Tensor | None``).
            Returns a tuple. ``None``: the operator has no derivative.
        results: names of the results that the operator returns, separated by spaces.
        saved: names of the tensors that ``forward`` returns behind the results for ``backward``.
        gradients: names of the inputs whose gradients ``backward`` returns, in this order. The
            gradient of an input that is ``None`` or needs none is dropped.
        residual: name of the input that the operator adds its work to: the gradient of the first
            result is also that of this input.
        shapes: takes the inputs, and returns empty tensors like all that ``forward`` returns. With
            it, ``forward`` and ``backward`` are annotated with types that torch's schemas have.
            ``None``: the operator cannot be captured, and its inputs may be anything.
        gradient_shapes: takes what ``backward`` takes, and returns empty tensors like the
            gradients. ``None``: ``backward`` is made of tensor operations.
        devices: where a captured operator runs; ``None`` is everywhere.

    Returns:
        a function of the inputs, by position; differentiable once: second derivatives are refused
        with an ``InputError``.
    """
    take_results = functools.partial(_take_results, len(results.split()) if saved else None)
    always_saves = forward
    if "saves" in inspect.signature(forward).parameters:
        always_saves = functools.partial(forward, saves=True)
        forward = functools.partial(forward, saves=False)
    captured = differentiated = None
    if shapes is not None:
        captured = _register(name, always_saves, shapes, devices)
    if backward is not None:
        formula = _Formula(forward, backward, results, saved, gradients, residual)
        differentiated = _build_function(name, always_saves, backward, formula, take_results)
        if captured is not None:
            if gradient_shapes is not None:
                backward = _register(f"{name}_backward", backward, gradient_shapes, devices)
            _differentiate(captured, backward, formula)

    def run(*inputs: Any) -> Any:
        if captured is not None and torch.compiler.is_compiling():
            return take_results(captured(*inputs))
        if differentiated is not None and is_transformed():
            raise InputError(
                f"torch.func cannot look into the compiled operator {name!r}; call "
                "model.set_backend('auto') or 'reference', which let it look into all others"
            )
        if differentiated is not None and _need_gradient(inputs):
            return differentiated(*inputs)
        return take_results(forward(*inputs))

    return run


def _take_results(num_results: int | None, outputs: Any) -> Any:
    """Return the results among all outputs; ``None``: they are results only."""
    if num_results is None:
        return outputs
    return outputs[0] if num_results == 1 else outputs[:num_results]


def _need_gradient(inputs: Sequence[Any]) -> bool:
    """Return whether a backward pass may come."""
    if torch.is_grad_enabled():
        for x in inputs:
            if isinstance(x, Tensor) and x.requires_grad:
                return True
    return False


def _list_inputs(function: Function) -> list[inspect.Parameter]:
    """Return the parameters that are no keywords."""
    parameters = inspect.signature(function).parameters.values()
    return [x for x in parameters if x.kind is not x.KEYWORD_ONLY]


def _register(name: str, function: Function, shapes: Function, devices: str | None) -> Any:
    """Return a function as an operator of torch, without its keywords."""

    def call(*inputs: Any) -> Any:
        return function(*inputs)

    signature = inspect.signature(function).replace(parameters=_list_inputs(function))
    call.__signature__ = signature  # type: ignore[attr-defined]
    operator = torch.library.custom_op(
        f"unimatrix::{name}", call, mutates_args=(), device_types=devices
    )
    operator.register_fake(shapes)
    return operator


class _Formula:
    """What a call keeps for its backward pass, and where the gradients go.

    The arguments are those of ``declare_operator``.
    """

    def __init__(
        self,
        forward: Function,
        backward: Function,
        results: str,
        saved: str,
        gradients: str,
        residual: str,
    ) -> None:
        inputs = {x.name: x.annotation for x in _list_inputs(forward)}
        values = [*inputs, *results.split(), *saved.split()]
        self.num_inputs, self.num_results = len(inputs), len(results.split())
        taken = _list_inputs(backward)
        names = [x.name for x in taken[: -self.num_results]]
        are_tensors = [inputs.get(name, Tensor) in (Tensor, Tensor | None) for name in names]
        assert are_tensors == sorted(are_tensors, reverse=True), "tensors come before numbers"
        places, num_tensors = [values.index(name) for name in names], sum(are_tensors)
        self.tensors, self.numbers = places[:num_tensors], places[num_tensors:]
        self.fills_gradients = all(x.annotation is Tensor for x in taken[-self.num_results :])
        self.has_residual = bool(residual)
        self.targets = [values.index(name) for name in (residual + " " + gradients).split()]

    def keep(self, ctx: Any, inputs: Sequence[Any], outputs: Any) -> None:
        """Keep what the backward pass takes."""
        values = (*inputs, outputs) if isinstance(outputs, Tensor) else (*inputs, *outputs)
        ctx.save_for_backward(*[values[place] for place in self.tensors])
        ctx.numbers = [values[place] for place in self.numbers]
        ctx.set_materialize_grads(self.fills_gradients)

    def differentiate(self, ctx: Any, backward: Function, grads: Sequence[Any]) -> tuple[Any, ...]:
        """Return the gradients of all inputs."""
        found = backward(*ctx.saved_tensors, *ctx.numbers, *grads[: self.num_results])
        if self.has_residual:
            found = (grads[0], *found)
        of_inputs = [None] * self.num_inputs
        for place, gradient in zip(self.targets, found, strict=True):
            if ctx.needs_input_grad[place]:
                of_inputs[place] = gradient
        return tuple(of_inputs)


def _build_function(
    name: str, forward: Function, backward: Function, formula: _Formula, take_results: Function
) -> Function:
    """Return what autograd calls eagerly."""

    def run(ctx: Any, *inputs: Any) -> Any:
        outputs = forward(*inputs)
        formula.keep(ctx, inputs, outputs)
        return take_results(outputs)

    def differentiate(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        if not torch.is_grad_enabled():
            return formula.differentiate(ctx, backward, grads)
        with torch.no_grad():
            found = formula.differentiate(ctx, backward, grads)
        return refuse_twice(f"the compiled operator {name!r}", found, *ctx.saved_tensors, *grads)

    methods = {"forward": staticmethod(run), "backward": staticmethod(differentiate)}
    made: Any = type(name, (torch.autograd.Function,), methods)
    apply: Function = made.apply
    return apply


def refuse_twice(what: str, gradients: tuple[Any, ...], *sources: Tensor | None) -> tuple[Any, ...]:
    """Return gradients that may not be differentiated again.

    ``once_differentiable`` of torch says so only where what comes from the loss side depends on the
    weights, and only to ``backward``: ``torch.autograd.grad`` walks past it, and returns second
    derivatives without the part that goes through the operator.

    Args:
        what: names the operator, in the sentence of the ``InputError``.
        gradients: of the inputs, ``None`` for some.
        sources: what the gradients depend on.
    """
    tensors = [x for x in sources if isinstance(x, Tensor) and x.requires_grad]
    if not torch.is_grad_enabled() or not tensors:  # Only `create_graph=True` enables it here.
        return gradients
    found = [x for x in gradients if x is not None]
    marked = iter(_Once.apply(what, len(found), *found, *tensors))  # type: ignore[no-untyped-call]
    return tuple(None if x is None else next(marked) for x in gradients)


class _Once(torch.autograd.Function):
    """Identity on gradients, whose own backward pass is refused."""

    @staticmethod
    def forward(ctx: Any, what: str, num_gradients: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.what = what
        return tuple(x.view_as(x) for x in tensors[:num_gradients])

    @staticmethod
    def backward(ctx: Any, *_grads: Any) -> Any:
        raise InputError(
            f"{ctx.what} is differentiable once; for second derivatives compute the loss after "
            "model.set_backend('reference')"
        )


def _differentiate(captured: Any, backward: Function, formula: _Formula) -> None:
    """Give a captured operator its derivative."""

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        formula.keep(ctx, inputs, output)
        if not isinstance(output, Tensor):
            ctx.mark_non_differentiable(*output[formula.num_results :])

    def differentiate(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        return formula.differentiate(ctx, backward, grads)

    captured.register_autograd(differentiate, setup_context=keep)
