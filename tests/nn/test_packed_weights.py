"""The weights of the block are packed once for all depth steps, where that changes nothing."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models import VARIANTS, build_model, draw_ids
from unimatrix.modeling import UniMatrixForCausalLM, UniMatrixModel


def measure(model: UniMatrixForCausalLM, ids: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """Return the loss and every gradient."""
    model.zero_grad()
    loss = model(ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("variant", VARIANTS)
def test_sharing_them_changes_nothing(variant, monkeypatch) -> None:
    model, ids = build_model(variant).double(), draw_ids(2, 24)
    shared = measure(model, ids)
    monkeypatch.setattr(UniMatrixModel, "_pack_block", lambda *_: None)
    torch.testing.assert_close(shared, measure(model, ids), rtol=1e-9, atol=1e-12)


def test_a_block_that_is_more_than_its_weights_packs_at_every_step() -> None:
    model = build_model("unimatrix")
    x = torch.zeros(2, 24, model.config.hidden_size)
    assert model.model._pack_block(x).gates is not None
    hook = model.model.block.register_forward_pre_hook(lambda *_: None)
    assert model.model._pack_block(x) is None
    hook.remove()
    model.model.block.forward = model.model.block.forward
    assert model.model._pack_block(x) is None
    del model.model.block.forward
    model.gradient_checkpointing_enable()
    assert model.model._pack_block(x).gates is not None
    model.train()
    assert model.model._pack_block(x) is None
    wrapped = build_model("unimatrix")
    wrapped.model.block.__class__ = type("Wrapped", (type(wrapped.model.block),), {})
    assert wrapped.model._pack_block(x) is None
