"""A layer in the place of another is called unless the passes read all that it is."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from tests.models import build_model, draw_ids
from unimatrix.kernels.plan import explain_plan
from unimatrix.modeling import UniMatrixForCausalLM

IDS = draw_ids(2, 40)
WIDE = {"hidden_size": 16, "num_attention_heads": 2, "head_dim": 8, "slot_key_size": 16}
# Widths that no pass over whole layers takes: their layers are joined, their sums are passes.
NARROW = {"hidden_size": 12, "num_attention_heads": 3, "head_dim": 4, "slot_key_size": 12}
MATRIX, SELECTIVE = "model.block.matrix_mixer", "model.block.selective_mixer"
NETWORK, MIXTURE = "model.block.feed_forward", "model.pointer_mixture"

# Name of the layer, what takes its place, variant, sizes. Those below the line have another shape,
# which torch refuses and a pass would read out of bounds.
CASES: list[tuple[str, Callable[[], nn.Module], str, dict[str, int]]] = [
    (f"{MATRIX}.q_proj", lambda: nn.Linear(16, 16), "selective", WIDE),
    (f"{MATRIX}.out_proj", lambda: nn.Linear(16, 16), "selective", WIDE),
    (f"{SELECTIVE}.value_proj", lambda: nn.Linear(16, 16), "selective", WIDE),
    (f"{NETWORK}.up_proj", lambda: nn.Linear(16, 171), "selective", WIDE),
    (f"{NETWORK}.down_proj", lambda: nn.Linear(171, 16), "selective", WIDE),
    ("lm_head", lambda: nn.Linear(16, 23), "selective", WIDE),
    (f"{MATRIX}.residual_gate", lambda: nn.Linear(12, 12, bias=False), "selective", NARROW),
    ("model.block.context_gate", lambda: nn.Linear(16, 16, bias=False), "selective", WIDE),
    ("model.block.context_gate", lambda: nn.Linear(12, 12, bias=False), "selective", NARROW),
    (f"{MIXTURE}.slot_score", lambda: nn.Linear(16, 1, bias=False), "selective", WIDE),
    (f"{NETWORK}.up_proj", lambda: nn.Linear(16, 64, bias=False), "core", WIDE),
    ("model.block.norm", lambda: nn.RMSNorm(16, 1e-5, elementwise_affine=False), "selective", WIDE),
    ("model.norm", lambda: nn.RMSNorm(16), "selective", WIDE),
    ("model.block.norm", lambda: nn.LayerNorm(16, bias=False), "core", WIDE),
    # ---
    ("model.block.context_gate", lambda: nn.Linear(16, 8), "selective", WIDE),
    ("model.block.context_gate", lambda: nn.Linear(12, 6), "selective", NARROW),
    (f"{SELECTIVE}.read_gate", lambda: nn.Linear(16, 8), "selective", WIDE),
    (f"{MATRIX}.retention_proj", lambda: nn.Linear(16, 8), "selective", WIDE),
    (f"{SELECTIVE}.value_proj", lambda: nn.Linear(16, 8, bias=False), "selective", WIDE),
    (f"{MIXTURE}.slot_score", lambda: nn.Linear(16, 3), "selective", WIDE),
    ("model.residual_context.embed", lambda: nn.Embedding(23, 8), "selective", WIDE),
    ("model.norm", lambda: nn.RMSNorm(8, 1e-5), "selective", WIDE),
    (f"{NETWORK}.up_proj", lambda: nn.Linear(16, 100), "core", WIDE),
]


def replace(
    name: str, layer: nn.Module, variant: str, sizes: dict[str, int]
) -> UniMatrixForCausalLM:
    """Return a model with a layer in the place of another."""
    model = build_model(variant, dtype=torch.float32, dropout=0.0, **sizes)
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, layer)
    return model


def measure(model: UniMatrixForCausalLM) -> Any:
    """Return the loss, the gradients and the first tokens written; an error's kind if one came."""
    try:
        loss = model(IDS, labels=IDS, loss_only=True).loss
        loss.backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        mask = torch.ones_like(IDS)
        ids = model.generate(IDS, attention_mask=mask, max_new_tokens=4, do_sample=False)
    except (RuntimeError, ValueError, IndexError):
        return None
    return [loss.detach(), *grads, ids.double()]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_a_layer_of_another_form_is_called(case: int) -> None:
    name, build, variant, sizes = CASES[case]
    torch.manual_seed(0)
    model = replace(name, build(), variant, sizes)
    model.set_backend("reference")
    expected = measure(model)
    model.set_backend("auto")
    found = measure(model)
    if expected is None:
        assert found is None
    else:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert explain_plan(model, 1), "the compiled step is for models as they were built"


def test_the_same_form_again_runs_compiled() -> None:
    gate = nn.Linear(16, 16)
    model = replace("model.block.context_gate", gate, "selective", WIDE)
    assert explain_plan(model, 80) == explain_plan(model, 1) == {}
    model.model.norm = nn.RMSNorm(16, eps=1e-3)
    assert explain_plan(model, 80) == {}  # a pass is told the eps, the step is not
    assert explain_plan(model, 1) == {"decode step": "the eps of model.norm is 0.001"}


@pytest.mark.parametrize("training", [False, True])
def test_a_hooked_dropout_is_called(training: bool) -> None:
    model = build_model("selective", dtype=torch.float32, dropout=0.0, **WIDE).train(training)
    calls: list[int] = []
    model.model.block.dropout.register_forward_hook(lambda *_: calls.append(1))
    model(IDS)
    assert len(calls) == 2 * model.config.num_hidden_layers


def test_a_hook_on_every_module_is_called() -> None:
    model = build_model("selective", dtype=torch.float32, dropout=0.0, **WIDE)
    kinds: set[str] = set()
    hook = register_module_forward_hook(lambda module, *_: kinds.add(type(module).__name__))
    try:
        model(IDS, labels=IDS, loss_only=True)
        reason = "a hook on every module is set"
        assert explain_plan(model, 80) == {"all parts": reason}
        assert explain_plan(model, 1) == {"decode step": reason}
    finally:
        hook.remove()
    assert {"Linear", "RMSNorm", "Dropout", "MatrixMixer", "PointerMixture"} <= kinds
