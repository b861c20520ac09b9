"""Every model of a comparison has as many parameters as the first."""

from dataclasses import replace

import pytest
import torch

from tests.studies.compare.small import MODELS
from unimatrix.errors import InputError
from unimatrix.presets import PRESETS
from unimatrix.studies.compare.models import PARAMETER_TOLERANCE, count_first, plan_models
from unimatrix.studies.compare.recipe import PEER_NAMES, build_comparison, choose_models
from unimatrix.tasks import AssociativeRecall

EVERY = {
    "ours": MODELS["ours"] | {"overrides": {"hidden_size": 48, "num_attention_heads": 3}},
    **{name: {"preset": name} for name in PRESETS},
    **{name: {"peer": name} for name in PEER_NAMES},
}


@pytest.mark.parametrize("num_layers", [2, 3])
def test_equal_parameters(num_layers) -> None:
    values = {"models": EVERY, "num_layers": num_layers}
    comparison = build_comparison("every", values)
    target = count_first(comparison)
    makers = plan_models(comparison)
    assert [maker.name for maker in makers] == list(EVERY)
    for maker in makers:
        found = maker.build_for_text().num_parameters()
        assert abs(found - target) <= PARAMETER_TOLERANCE * target, maker.name
    first = makers[0].build_for_text()
    assert (first.num_parameters(), first.config.hidden_size) == (target, 48)


def test_a_choice_of_models_keeps_the_number_of_parameters() -> None:
    comparison = build_comparison("every", {"models": EVERY})
    every = {maker.name: maker.size for maker in plan_models(comparison)}
    (one,) = plan_models(choose_models(comparison, ["rwkv"]))
    assert one.size == every["rwkv"]


def test_weights_come_from_the_seed_alone() -> None:
    comparison = build_comparison("tiny", {"models": MODELS, "num_heads": 2, "num_layers": 1})
    weights = []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(noise)
        before = torch.random.get_rng_state()
        maker = plan_models(replace(comparison, seed=seed))[1]
        weights.append(next(maker.build_for_text().parameters()).clone())
        assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_recall_models_differ_in_what_recall_needs() -> None:
    comparison = build_comparison("tiny", {"models": MODELS, "num_heads": 2, "num_layers": 1})
    ours, theirs = (
        maker.build_for_recall(AssociativeRecall()) for maker in plan_models(comparison)
    )
    assert ours.config.vocab_size == theirs.config.vocab_size == 64
    assert (ours.config.index_units, ours.config.automaton_window) == ("tokens", 128)
    assert ours.config.max_position_embeddings is None
    assert ours.config.dropout == 0


def test_a_size_that_cannot_be_had() -> None:
    tiny = {"preset": "core", "overrides": {"hidden_size": 4, "intermediate_size": 4}}
    values = {"models": {"ours": tiny, "wide": {"peer": "llama"}}, "num_layers": 40}
    with pytest.raises(InputError, match=r"model 'wide' has no size with .* parameters"):
        plan_models(build_comparison("tiny", values))
