"""A comparison is read from TOML, and what cannot be meant is refused with the fix."""

from pathlib import Path

import pytest

from tests.studies.compare.small import MODELS, describe_comparison
from unimatrix.baselines.peers import PEERS
from unimatrix.errors import InputError
from unimatrix.studies.compare.recipe import (
    PEER_NAMES,
    build_comparison,
    choose_corpora,
    choose_models,
    list_comparisons,
    load_comparison,
    shorten,
)
from unimatrix.train.recipe import ModelSection, load_recipe
from unimatrix.train.run import build_model

CORPUS = Path("corpus")


def test_peers_are_those_that_can_be_built() -> None:
    assert set(PEER_NAMES) == set(PEERS)


@pytest.mark.parametrize("name", list_comparisons())
def test_shipped_comparisons_are_whole(name) -> None:
    comparison = load_comparison(name)
    peers = {entry.peer for entry in comparison.models.values()}
    assert peers >= {"llama", "mamba2", "gated-deltanet"}
    quick = shorten(comparison)
    assert quick.models == comparison.models
    assert quick.text.steps < comparison.text.steps
    assert quick.name == f"{name}-quick"


def test_the_small_one_has_every_peer_and_cells_of_minutes() -> None:
    comparison = load_comparison("small")
    assert {entry.peer for entry in comparison.models.values()} >= set(PEER_NAMES)
    for section in (comparison.text, comparison.sweep, comparison.recall):
        assert section.minutes <= 10


@pytest.mark.parametrize(("name", "recipe"), [("small", "default"), ("books", "books")])
def test_ours_is_what_train_trains(name, recipe) -> None:
    entry = load_comparison(name).models["unimatrix"]
    section = load_recipe(recipe).model
    theirs = dict(section.overrides) | {"dropout": 0.0}
    train, ours = load_recipe(recipe).train, load_comparison(name).train
    for field in ("batch_size", "optimizer", "schedule", "warmup_fraction", "weight_decay"):
        assert getattr(ours, field) == getattr(train, field), field
    assert (entry.preset, entry.overrides | {"dropout": 0.0}) == (section.preset, theirs)
    assert build_model(ModelSection(preset=entry.preset, overrides=entry.overrides), 0)


def test_a_file_is_read(tmp_path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('[models.a]\npeer = "llama"\n[models.b]\npreset = "core"\n[text]\nsteps = 7\n')
    comparison = load_comparison(path)
    assert (comparison.name, list(comparison.models)) == ("mine", ["a", "b"])
    assert (comparison.text.steps, comparison.sweep.corpus) == (7, "pystdlib")
    assert list(choose_models(comparison, ["b"]).chosen) == ["b"]
    assert list(choose_models(comparison, ["b"]).models) == ["a", "b"]
    elsewhere = choose_corpora(comparison, ["x", "y"])
    assert (elsewhere.corpora, elsewhere.sweep.corpus) == (("x", "y"), "x")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modells": {}}, "unknown key 'modells'. Did you mean 'models'"),
        ({"models": {}}, "names no model"),
        ({"models": 3}, "models is 3; it must be sections"),
        ({"models": {"a": {}}}, "model 'a' needs either a preset or a peer"),
        ({"models": {"a": {"peer": "lama"}}}, "unknown peer 'lama'.*Did you mean 'llama'"),
        ({"models": {"a": {"peer": "llama", "overrides": {"dropout": 0.1}}}}, "takes no overrides"),
        ({"models": {"a": {"preset": "core", "overrides": {"x": 1}}}}, "no field 'x'"),
        ({"models": {"a": {"perr": "llama"}}}, "unknown key 'models.a.perr'. Did you mean 'peer'"),
        ({"tables": ["tim"]}, "unknown table 'tim'.*Did you mean 'time'"),
        ({"text": {"window_tokens": 15}}, "text.window_tokens is 15; it must be even"),
        ({"text": {"minutes": 121}}, "text.minutes is 121.0; it must be above 0 and at most 120"),
        ({"models": {"a": {"peer": "llama", "carried_automaton": True}}}, "has no automaton"),
        ({"text": {"steps": 0}}, "text.steps is 0"),
        ({"text": {"step": 3}}, "unknown key 'text.step'. Did you mean 'steps'"),
        ({"text": 3}, r"text is 3; it must be a section, \[text\]"),
        ({"sweep": {"learning_rates": []}}, "give at least one, above 0"),
        ({"train": {"steps": 3}}, "train.steps is each cell's own"),
        ({"num_layers": "three"}, "num_layers is 'three'; it must be a whole number"),
    ],
)
def test_unusable_comparisons(changes, message) -> None:
    with pytest.raises(InputError, match=message):
        build_comparison("tiny", describe_comparison(CORPUS, **changes))


def test_unknown_names() -> None:
    with pytest.raises(InputError, match=r"no comparison 'smal'.*Did you mean 'small'"):
        load_comparison("smal")
    comparison = build_comparison("tiny", describe_comparison(CORPUS))
    with pytest.raises(InputError, match="no model 'their'; choose one of ours, theirs"):
        choose_models(comparison, ["their"])
    assert set(comparison.models) == set(MODELS)
