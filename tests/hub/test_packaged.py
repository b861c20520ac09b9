"""Models that come with the package are found by name wherever a model is given."""

import json

import pytest
import torch

from tests.byte_models import build_byte_model, save_model
from tests.cli.command import assert_refused, run_command
from unimatrix import UniMatrixConfig, UniMatrixForCausalLM, UniMatrixTokenizer
from unimatrix.errors import InputError
from unimatrix.hub import packaged
from unimatrix.hub.load import load_config, load_model
from unimatrix.hub.packaged import PACKAGED_MODELS, READER, find_packaged
from unimatrix.presets import PRESETS
from unimatrix.tokenization import build_tokenizer
from unimatrix.train.recipe import Recipe, list_recipes, make_paths_absolute, override

IDS = torch.arange(12).view(2, 6)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return the folder of a packaged model that is small and not trained."""
    monkeypatch.setattr(packaged, "FOLDER", tmp_path / "models")
    made = tmp_path / "models" / "reader"
    save_model(made, build_byte_model("core", seed=3))
    build_tokenizer().save_pretrained(made)
    monkeypatch.chdir(tmp_path)
    return made


def test_a_name_is_its_folder(folder) -> None:
    assert find_packaged(READER) == folder
    assert find_packaged("core") is None
    assert find_packaged(folder) is None
    expected = build_byte_model("core", seed=3)(IDS).logits
    assert torch.equal(load_model(READER).model(IDS).logits, expected)
    assert load_config(READER).hidden_size == 16


def test_our_classes_load_by_name(folder) -> None:
    expected = build_byte_model("core", seed=3)(IDS).logits
    assert torch.equal(UniMatrixForCausalLM.from_pretrained(READER).eval()(IDS).logits, expected)
    named = UniMatrixForCausalLM.from_pretrained(pretrained_model_name_or_path=READER)
    assert torch.equal(named.eval()(IDS).logits, expected)
    assert UniMatrixConfig.from_pretrained(READER).hidden_size == 16
    assert UniMatrixTokenizer.from_pretrained(READER)("a")["input_ids"] == [257, 97]


def test_a_folder_of_that_name_comes_first(folder) -> None:
    save_model(folder.parents[1] / READER, build_byte_model("core", hidden_size=8))
    assert load_config(READER).hidden_size == 8
    assert UniMatrixForCausalLM.from_pretrained(READER).config.hidden_size == 8


def test_missing_weights_are_one_sentence(folder) -> None:
    (folder / "model.safetensors").unlink()
    for load in (load_model, load_config, UniMatrixForCausalLM.from_pretrained):
        with pytest.raises(InputError, match=r"missing in this installation; train them with"):
            load(READER)
    assert_refused(run_command("info", READER), "the weights of 'unimatrix-reader' are missing")


def test_the_command_line_takes_the_name(folder) -> None:
    assert run_command("info", READER, "--json").result["model"] == READER
    result = run_command("generate", READER, "ab", "--max-new-bytes", 4, "--json").result
    assert result["bytes"] <= 4
    assert_refused(run_command("generate", "unimatrix-reder", "ab"), f"Did you mean '{READER}'?")


def test_training_may_start_from_it(folder) -> None:
    recipe = make_paths_absolute(override(Recipe(), [f"model.init={READER}"]))
    assert recipe.model.init == READER


def test_no_other_thing_has_such_a_name() -> None:
    assert not set(PACKAGED_MODELS) & {*PRESETS, *list_recipes()}


def test_what_the_package_carries_is_whole() -> None:
    """Weights that are there load, are small, and say how they were made."""
    for name, short in PACKAGED_MODELS.items():
        folder = packaged.FOLDER / short
        if not folder.is_dir():
            continue
        assert load_model(name).model.dtype == torch.float32
        assert (folder / "model.safetensors").stat().st_size <= 2_000_000
        assert not list(folder.glob("*.py"))
        training = (folder / "training.json").read_text()
        assert {"recipe", "record"} == set(json.loads(training))


def test_only_what_is_there_is_named(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(packaged, "FOLDER", tmp_path)
    assert packaged.list_packaged() == []
    with pytest.raises(InputError, match=r"no run folder, saved model or preset") as caught:
        load_config("nothing")
    assert "comes with the package" not in str(caught.value)
    save_model(tmp_path / "reader", build_byte_model())
    assert packaged.list_packaged() == [packaged.READER]
    with pytest.raises(InputError, match="and unimatrix-reader comes with the package"):
        load_config("nothing")
