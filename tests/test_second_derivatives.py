"""Second derivatives: right by the reference, by ``torch.func`` too, and never wrong."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, jvp

from tests.models import build_model, draw_ids
from tests.tolerances import error
from unimatrix.configuration import PRESETS
from unimatrix.errors import InputError
from unimatrix.modeling import UniMatrixForCausalLM

IDS = draw_ids(2, 20)
STEP = 1e-6
presets = pytest.mark.parametrize("preset", PRESETS)


def list_trained(model: UniMatrixForCausalLM) -> list[Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def draw_direction(weights: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(w.shape, generator=generator, dtype=w.dtype) for w in weights]


def difference(
    model: UniMatrixForCausalLM, weights: list[Tensor], direction: list[Tensor]
) -> list[Tensor]:
    """Return the Hessian's product with a direction by central differences of gradients."""

    def find_gradient(step: float) -> list[Tensor]:
        with torch.no_grad():
            for weight, part in zip(weights, direction, strict=True):
                weight.add_(part, alpha=step)
        loss = model(IDS, labels=IDS).loss
        found = torch.autograd.grad(loss, weights, allow_unused=True)
        with torch.no_grad():
            for weight, part in zip(weights, direction, strict=True):
                weight.sub_(part, alpha=step)
        return [
            torch.zeros_like(w) if g is None else g for w, g in zip(weights, found, strict=True)
        ]

    pairs = zip(find_gradient(STEP), find_gradient(-STEP), strict=True)
    return [(ahead - behind) / (2 * STEP) for ahead, behind in pairs]


def join(parts: list[Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in parts])


def multiply_hessian(
    model: UniMatrixForCausalLM, weights: list[Tensor], direction: list[Tensor], **options: bool
) -> list[Tensor]:
    loss = model(IDS, labels=IDS, **options).loss
    gradients = torch.autograd.grad(loss, weights, create_graph=True, allow_unused=True)
    pairs = zip(gradients, direction, strict=True)
    product = sum((g * part).sum() for g, part in pairs if g is not None)
    found = torch.autograd.grad(product, weights, allow_unused=True)
    return [torch.zeros_like(w) if f is None else f for w, f in zip(weights, found, strict=True)]


@presets
def test_hessian_products_of_the_reference(preset: str) -> None:
    model = build_model(preset)
    model.set_backend("reference")
    weights = list_trained(model)
    direction = draw_direction(weights)
    found = multiply_hessian(model, weights, direction)
    assert error(join(found), join(difference(model, weights, direction))) <= 1e-4


@pytest.mark.parametrize("loss_only", [False, True])
@presets
def test_compiled_operators_refuse_a_second_derivative(preset: str, loss_only: bool) -> None:
    """``torch.autograd.grad`` used to walk past them, and was 25 to 100 per cent off."""
    model = build_model(preset)
    weights = list_trained(model)
    with pytest.raises(InputError, match=r"differentiable once; .*set_backend\('reference'\)"):
        multiply_hessian(model, weights, draw_direction(weights), loss_only=loss_only)
    # A graph of the gradients that nobody differentiates changes none of them.
    loss = model(IDS, labels=IDS, loss_only=loss_only).loss
    kept = torch.autograd.grad(loss, weights, create_graph=True, allow_unused=True)
    loss = model(IDS, labels=IDS, loss_only=loss_only).loss
    plain = torch.autograd.grad(loss, weights, allow_unused=True)
    for one, other in zip(kept, plain, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


def test_what_a_gate_learns_in_hindsight_has_no_second_derivative() -> None:
    model = build_model("selective", dropout=0.0).train()
    model.set_backend("reference")
    weights = list_trained(model)
    with pytest.raises(InputError, match="learns in hindsight is differentiable once"):
        multiply_hessian(model, weights, draw_direction(weights))


def build_loss(model: UniMatrixForCausalLM) -> Callable[[dict[str, Tensor]], Tensor]:
    return lambda weights: functional_call(model, weights, (IDS,), {"labels": IDS}).loss


READS_TEXT = ["selective", "unimatrix"]


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # forward mode's own
@pytest.mark.parametrize("preset", [name for name in PRESETS if name not in READS_TEXT])
def test_torch_func_looks_into_every_operator(preset: str) -> None:
    model = build_model(preset)
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    loss = build_loss(model)
    model(IDS, labels=IDS).loss.backward()
    for name, found in grad(loss)(weights).items():
        expected = model.get_parameter(name).grad
        expected = torch.zeros_like(found) if expected is None else expected
        assert error(found, expected) <= 1e-9 or float(found.abs().max()) <= 1e-12, name
    names = [name for name, weight in model.named_parameters() if weight.requires_grad]
    direction = dict(zip(names, draw_direction([weights[name] for name in names]), strict=True))
    moved = {name: direction.get(name, torch.zeros_like(w)) for name, w in weights.items()}
    _, found = jvp(grad(loss), (weights,), (moved,))
    expected = difference(model, list_trained(model), list(direction.values()))
    assert error(join([found[name] for name in names]), join(expected)) <= 1e-4


def test_torch_func_and_compiled_operators_by_name() -> None:
    model = build_model("core")
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    model.set_backend({"matrix_state": "native"})
    with pytest.raises(InputError, match=r"torch\.func cannot look into the compiled operator"):
        grad(build_loss(model))(weights)


@pytest.mark.parametrize("preset", READS_TEXT)
def test_torch_func_reads_no_text(preset: str) -> None:
    model = build_model(preset)
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    with pytest.raises(InputError, match=r"torch\.func cannot look into the index or automaton of"):
        grad(build_loss(model))(weights)
