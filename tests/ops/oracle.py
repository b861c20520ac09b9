"""One helper runs the reference and a candidate on cloned leaves and compares everything."""

from collections.abc import Callable, Mapping

import torch

from tests.tolerances import error, limit
from unimatrix.ops.backends import BACKENDS

Outputs = Mapping[str, torch.Tensor | None]
Run = Callable[..., Outputs]


def list_backends(op: str) -> list[str]:
    """Return the back ends of ``op`` that run on the CPU; ``test_triton.py`` has the other."""
    return [backend for backend in BACKENDS[op] if backend != "triton"]


def candidates(op: str) -> list[str]:
    """Return those that have to meet its reference."""
    return [backend for backend in list_backends(op) if backend != "reference"]


def _run(
    run: Run, backend: str, leaves: Mapping[str, torch.Tensor | None]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the outputs and the gradient of every floating leaf under fixed cotangents."""
    cloned = {
        name: None
        if leaf is None
        else leaf.detach().clone().requires_grad_(leaf.is_floating_point())
        for name, leaf in leaves.items()
    }
    outputs = {name: value for name, value in run(backend, **cloned).items() if value is not None}
    generator = torch.Generator().manual_seed(0)
    objective = torch.zeros((), dtype=torch.float64)
    for name in sorted(outputs):
        value = outputs[name]
        if value.is_floating_point():
            cotangent = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            if value.requires_grad:
                objective = objective + (value.double() * cotangent).sum()
    if objective.requires_grad:
        objective.backward()
    grads = {
        name: leaf.grad if leaf.grad is not None else torch.zeros_like(leaf)
        for name, leaf in cloned.items()
        if leaf is not None and leaf.is_floating_point()
    }
    return {name: value.detach() for name, value in outputs.items()}, grads


def compare_with_reference(
    op: str, backend: str, run: Run, leaves: Mapping[str, torch.Tensor | None]
) -> None:
    """Assert that ``backend`` equals the reference in every output and every input gradient.

    Args:
        op: operator name, a key of ``BACKENDS`` and of the tolerance table.
        backend: the candidate.
        run: ``run(backend, **leaves) -> {name: tensor}``; integer outputs must be equal.
        leaves: inputs by name; floating ones are differentiated. ``None`` stays ``None``.
    """
    dtypes = {
        leaf.dtype for leaf in leaves.values() if leaf is not None and leaf.is_floating_point()
    }
    dtype = dtypes.pop() if dtypes else torch.float64
    expected, expected_grads = _run(run, "reference", leaves)
    actual, actual_grads = _run(run, backend, leaves)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if value.is_floating_point():
            found = error(actual[name], value)
            assert found <= limit(op, dtype, "value"), (
                f"{op}/{backend}: {name} differs by {found:.2e}"
            )
        else:
            assert torch.equal(actual[name], value), f"{op}/{backend}: {name} differs"
    for name, value in expected_grads.items():
        found = error(actual_grads[name], value)
        assert found <= limit(op, dtype, "grad"), f"{op}/{backend}: d{name} differs by {found:.2e}"
