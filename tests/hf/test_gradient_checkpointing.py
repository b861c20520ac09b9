"""Checkpointing changes neither loss nor gradients, in either form and through adapters."""

from typing import Any

import pytest
import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from tests.models import VARIANTS, build_model, draw_ids
from tests.tolerances import error, limit

variants = pytest.mark.parametrize("variant", VARIANTS)
reentrant = pytest.mark.parametrize("use_reentrant", [False, True])


def measure(model: Any, **inputs: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the loss and the gradient of every parameter that has one."""
    torch.manual_seed(5)
    model.zero_grad(set_to_none=True)
    ids = draw_ids(2, 11)
    loss = model(input_ids=ids, labels=ids, **inputs).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def require_equal(model: Any, use_reentrant: bool, **inputs: Any) -> None:
    """Fail unless the model computes the same with checkpointing."""
    loss, grads = measure(model, **inputs)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    found_loss, found = measure(model, **inputs)
    assert error(found_loss, loss) <= limit("golden", torch.float64, "grad")
    assert found.keys() == grads.keys()
    for name, grad in grads.items():
        assert error(found[name], grad) <= limit("golden", torch.float64, "grad"), name


@reentrant
@variants
def test_checkpointing_changes_nothing(variant: str, use_reentrant: bool) -> None:
    mask = torch.ones(2, 11, dtype=torch.int64)
    mask[0, :3] = 0
    model = build_model(variant, dropout=0.1).train()
    require_equal(model, use_reentrant, attention_mask=mask)
    (layer,) = (m for m in model.modules() if isinstance(m, GradientCheckpointingLayer))
    assert layer.gradient_checkpointing
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


@reentrant
@pytest.mark.parametrize("variant", ["sparsepointer", "selective", "selective+hidden", "unimatrix"])
def test_the_layer_is_computed_again(variant: str, use_reentrant: bool) -> None:
    model = build_model(variant).train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    calls = []
    model.model.block.feed_forward.register_forward_hook(lambda *_: calls.append(1))
    measure(model)
    assert len(calls) == 2 * model.config.num_hidden_layers


@reentrant
@pytest.mark.parametrize("variant", ["core", "sparsepointer", "selective", "unimatrix"])
def test_checkpointing_of_adapters(variant: str, use_reentrant: bool) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    model = peft.get_peft_model(build_model(variant), config).double().train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    model.enable_input_require_grads()
    require_equal(model, use_reentrant)


@reentrant
def test_a_stream_trains_through_its_cache_with_checkpointing(use_reentrant: bool) -> None:
    """What a layer carries is a result of it too, and its gradient counts."""
    grads = []
    for checkpoints in (False, True):
        model = build_model("selective", dropout=0.0).train()
        if checkpoints:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        ids = draw_ids(2, 12)
        first = model(ids[:, :6], use_cache=True)
        model(ids[:, 6:], past_key_values=first.past_key_values, labels=ids[:, 6:]).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert error(grads[1][name], grad) <= limit("golden", torch.float64, "grad"), name
