"""What a checkpoint lacks starts as it does in a fresh model."""

from collections.abc import Iterator

import pytest
import torch
from transformers import PreTrainedModel

from tests.models import build_model
from unimatrix import UniMatrixForCausalLM
from unimatrix.baselines.linear_attention.modeling import (
    LinearAttentionConfig,
    LinearAttentionForCausalLM,
)
from unimatrix.configuration import PRESETS, UniMatrixConfig


@pytest.fixture
def _nan_in_new_tensors() -> Iterator[None]:
    """Fill memory that nothing has written yet with NaN."""
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(was_deterministic)


def load_without_weights(fresh: PreTrainedModel) -> PreTrainedModel:
    """Return a model of the same configuration, loaded from a checkpoint that holds nothing."""
    loaded: PreTrainedModel = type(fresh).from_pretrained(None, config=fresh.config, state_dict={})
    return loaded


def build_fresh(name: str) -> PreTrainedModel:
    """Return a new model of a preset, or of a rule of the linear-attention baseline."""
    if name in PRESETS:
        return UniMatrixForCausalLM(UniMatrixConfig.preset(name))
    return LinearAttentionForCausalLM(LinearAttentionConfig(rule=name, conv_size=4))


def list_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return parameters and buffers, those that are not saved among them."""
    return dict([*model.named_parameters(), *model.named_buffers()])


@pytest.mark.usefixtures("_nan_in_new_tensors")
@pytest.mark.parametrize("name", [*PRESETS, "gated", "gated_delta"])
def test_missing_weights_start_as_in_a_fresh_model(name: str) -> None:
    fresh, other = build_fresh(name), list_tensors(build_fresh(name))
    loaded = list_tensors(load_without_weights(fresh))
    assert loaded.keys() == other.keys()
    for key, tensor in list_tensors(fresh).items():
        assert loaded[key].isfinite().all(), key
        assert loaded[key].requires_grad == tensor.requires_grad, key
        if torch.equal(tensor, other[key]):
            assert torch.equal(loaded[key], tensor), key  # nothing about it is drawn
        elif tensor.numel() >= 32:
            assert 0.5 < loaded[key].std() / tensor.std() < 2, key


def test_a_missing_bias_leaves_the_weight_beside_it() -> None:
    fresh = UniMatrixForCausalLM(UniMatrixConfig.preset("selective"))
    weights = {n: torch.full_like(p, 0.25) for n, p in fresh.state_dict().items()}
    gate = "model.block.matrix_mixer.retention_proj"
    del weights[f"{gate}.bias"]
    loaded = UniMatrixForCausalLM.from_pretrained(None, config=fresh.config, state_dict=weights)
    started = loaded.state_dict()
    assert torch.equal(started.pop(f"{gate}.bias"), fresh.state_dict()[f"{gate}.bias"])
    assert all((tensor == 0.25).all() for tensor in started.values())


@pytest.mark.parametrize("variant", ["core", "sparsepointer", "discovery", "selective+small"])
def test_what_is_frozen_is_frozen_after_loading(variant: str, tmp_path) -> None:
    model = build_model(variant, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    loaded, _ = UniMatrixForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert {name for name, p in loaded.named_parameters() if not p.requires_grad} == frozen
