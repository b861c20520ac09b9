import pytest
import torch

from tests.models import VARIANTS, build_model
from unimatrix.configuration import PRESETS, UniMatrixConfig
from unimatrix.evaluation.footprint import (
    count_parameters,
    list_growing_parts,
    measure_state_bytes,
)
from unimatrix.modeling import UniMatrixForCausalLM


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_belongs_to_a_part(variant) -> None:
    model = build_model(variant)
    assert sum(count_parameters(model).values()) == model.num_parameters()


def test_an_untied_head_is_a_part() -> None:
    model = build_model("core", tie_word_embeddings=False)
    counts = count_parameters(model)
    assert counts["head"] == counts["token_embedding"] == 23 * 12


def test_parts_of_the_published_core() -> None:
    assert count_parameters(UniMatrixForCausalLM(UniMatrixConfig())) == {
        "token_embedding": 259 * 64,
        "position_table": 128 * 64,
        "matrix_mixer": 5 * 64 * 64 + (64 * 4 + 4) + (64 * 64 + 64),
        "feed_forward": 2 * 64 * 256 + 256 + 64,
        "norms": 3 * 2 * 64,
    }


def test_parts_of_the_selective_slots() -> None:
    model = UniMatrixForCausalLM(UniMatrixConfig.preset("selective"))
    counts = count_parameters(model)
    gate = 2 * 64 * 32 + 32 + 32 + 1
    # One read; the automaton's token has a score from the stream and one a length bucket.
    assert counts["selective_mixer"] == gate + 1 + 64 * 64 + 64 * 64 + 64
    assert counts["pointer_mixture"] == 2 * (64 + 1) + 10
    state = measure_state_bytes(model)
    # 4 bytes of key, 2 of value and 1 of strength; eight ids reach as far back as a write needs.
    assert state["slots"] == 64 * 7
    recent_streams = 3 * 3 * 64 * 4  # of the short convolution, by depth step
    assert state["previous_token"] == 8 * 4 + recent_streams


@pytest.mark.parametrize("variant", VARIANTS)
def test_state_bytes_are_those_of_a_saved_cache(variant, tmp_path) -> None:
    model = build_model(variant).float()
    # Where gradients are recorded, the gate's logits are carried beside the slots.
    with torch.no_grad():
        cache = model(input_ids=build_first_token(model), use_cache=True).past_key_values
    parts = measure_state_bytes(model)
    assert sum(parts.values()) == cache.num_bytes()
    expected = sum(t.numel() * t.element_size() for t in cache.tensors().values())
    assert sum(parts.values()) == expected


@pytest.mark.parametrize("variant", VARIANTS)
def test_only_growing_parts_grow(variant) -> None:
    model = build_model(variant).float()
    short, long = (measure_state_bytes(model, num_tokens=n) for n in (1, 70))
    grown = {part for part in long if long[part] != short.get(part)}
    assert grown <= set(list_growing_parts(model))
    if model.config.associative_memory == "dense":
        assert grown == {"dense_memory"}


def build_first_token(model):
    return model.dummy_inputs["input_ids"][:1, :1] * 0 + model.config.bos_token_id


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("num_tokens", [1, 128])
def test_backends_are_resolved(variant, num_tokens) -> None:
    model = build_model(variant)
    backends = model.name_backends(num_tokens)
    assert "auto" not in backends.values()
    assert ("matrix_state" in backends) == (model.config.update_rules != "none")
    assert ("slots" in backends) == (model.config.associative_memory == "slots")
    assert ("selective_slots" in backends) == (model.config.associative_memory == "selective")
    assert ("dense_memory" in backends) == (model.config.associative_memory == "dense")
    is_indexed = model.config.associative_memory == "indexed"
    assert ("indexed_attention" in backends) == is_indexed
    # An index of the text finds the longest suffix as well.
    runs_automaton = model.config.residual_path == "suffix_automaton" and not is_indexed
    assert ("suffix_automaton" in backends) == runs_automaton
    model.set_backend("reference")
    assert set(model.name_backends(num_tokens).values()) <= {"reference"}


def test_every_preset_is_a_variant() -> None:
    assert set(PRESETS) <= set(VARIANTS)
