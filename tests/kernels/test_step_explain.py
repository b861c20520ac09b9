"""What is not known to be supported is not."""

import pytest
import torch

from tests.models import build_model, draw_ids
from unimatrix.configuration import UniMatrixConfig, list_config_fields
from unimatrix.kernels.step import explain
from unimatrix.kernels.step.explain import explain_config, explain_step


def test_every_known_field_exists() -> None:
    assert set(explain._KNOWN) | explain._ANY_VALUE <= set(list_config_fields())
    assert not explain._ANY_VALUE & set(explain._KNOWN)


def test_a_field_that_nobody_listed_must_have_its_default(monkeypatch) -> None:
    monkeypatch.setattr(explain, "_ANY_VALUE", explain._ANY_VALUE - {"norm_guard"})
    monkeypatch.delitem(explain._KNOWN, "repeated_key")
    assert explain_config(UniMatrixConfig.preset("core")) is None
    assert explain_config(UniMatrixConfig.preset("core", norm_guard=True)) == "norm_guard is True"
    first = UniMatrixConfig.preset("selective", repeated_key="first")
    assert explain_config(first) == "repeated_key is 'first'"


def test_a_value_that_nobody_listed(monkeypatch) -> None:
    monkeypatch.setitem(explain._KNOWN, "update_rules", ("outer", "none"))
    assert explain_config(UniMatrixConfig.preset("discovery")) == "update_rules is 'mixed'"
    assert explain_config(UniMatrixConfig.preset("assoc")) == "associative_memory is 'dense'"


def test_usable_models() -> None:
    for dtype in (torch.float32, torch.float64):
        assert explain_step(build_model("selective", dtype=dtype)) is None


def test_models_that_are_not_as_they_were_built() -> None:
    model = build_model("sparsepointer")
    assert explain_step(model.train()) == "the model is in training mode"
    model.eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert explain_step(model) == "autocast is on"
    handle = model.model.block.register_forward_hook(lambda *_: None)
    assert explain_step(model) == "model.block has a hook"
    handle.remove()
    model.set_backend({"slots": "reference"})
    assert explain_step(model) == "the back end of model.block.slot_mixer is 'reference'"
    model.set_backend("auto")
    assert explain_step(model) is None
    model.model.block.norm.double().weight.data = model.model.block.norm.weight.data.float()
    assert explain_step(model) == "its parameters differ in device or type"
    assert explain_step(build_model("core").bfloat16()) == "its parameters are bfloat16 on cpu"


class Quantised(torch.Tensor):
    """What libraries that quantise or shard put in the place of a weight."""


def test_weights_of_another_class_are_left_to_their_modules() -> None:
    model, ids = build_model("core"), draw_ids(1, 5)
    expected = model.generate(ids, max_new_tokens=3, do_sample=False)
    layer = model.model.block.matrix_mixer.q_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach().as_subclass(Quantised), False)
    assert explain_step(model) == "model.block.matrix_mixer.q_proj.weight is a Quantised"
    assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False), expected)


def test_an_adapter_decodes_without_the_compiled_step() -> None:
    peft = pytest.importorskip("peft")
    base = build_model("core", dtype=torch.float32)
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], r=2)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.normal_()
    reason = explain_step(base)
    assert reason is not None
    assert "q_proj is a Linear" in reason
    ids = draw_ids(1, 6)
    arguments = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    expected = model.generate(input_ids=ids, use_cache=False, **arguments)
    assert torch.equal(model.generate(input_ids=ids, **arguments), expected)
