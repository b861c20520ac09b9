import json
import shutil

import pytest
import torch
from transformers import LlamaConfig

from tests.byte_models import build_byte_model, quiet_transformers, save_model
from tests.models import build_model
from unimatrix.configuration import UniMatrixConfig, list_config_fields
from unimatrix.errors import InputError
from unimatrix.hub.load import find_run_recipe, load_config, load_model, require_byte_level
from unimatrix.tokenization import build_tokenizer

IDS = torch.arange(12).view(2, 6)


@pytest.fixture
def folder(tmp_path):
    """Return the folder of a saved model."""
    save_model(tmp_path / "model", build_byte_model("sparsepointer", dropout=0.5))
    return tmp_path / "model"


def test_a_saved_model(folder, capfd) -> None:
    expected = build_byte_model("sparsepointer", dropout=0.5)
    model, tokenizer = load_model(folder)
    assert torch.equal(model(IDS).logits, expected(IDS).logits)
    assert not model.training
    assert tokenizer("a")["input_ids"] == [257, 97]
    assert capfd.readouterr() == ("", "")


def test_the_saved_tokenizer_and_dtype_are_used(folder) -> None:
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(folder)
    save_model(folder, build_byte_model("core").bfloat16())
    model, loaded = load_model(str(folder))
    assert model.dtype == torch.bfloat16
    assert type(loaded) is type(tokenizer)
    assert loaded.get_vocab() == tokenizer.get_vocab()


def test_the_configuration_comes_back_whole(folder) -> None:
    expected = build_byte_model("sparsepointer", dropout=0.5).config
    loaded = load_config(folder)
    for name in list_config_fields():
        assert getattr(loaded, name) == getattr(expected, name)


def test_a_preset_has_no_weights() -> None:
    with pytest.raises(InputError, match=r"is a preset, .* --preset rosa --out DIR"):
        load_model("rosa")
    model, tokenizer = load_model("rosa", weights_required=False)
    assert model.num_parameters() == 103_876
    assert tokenizer is not None
    assert load_config("rosa").to_dict() == UniMatrixConfig.preset("rosa").to_dict()


def test_a_folder_rules_over_a_preset(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "core").mkdir()
    assert load_config("core").hidden_size == 64
    save_model(tmp_path / "core", build_byte_model("core"))
    assert load_config("core").hidden_size == 16
    assert load_model("core").model.config.hidden_size == 16


def test_nothing_of_that_name(folder, monkeypatch) -> None:
    monkeypatch.chdir(folder.parent)
    with pytest.raises(InputError, match=r"no run folder.*Did you mean 'model'\?"):
        load_model("modle")
    with pytest.raises(InputError, match=r"Did you mean 'discovery'\?"):
        load_config("discovry")
    with pytest.raises(InputError, match="is a file; give the folder"):
        load_model(folder / "config.json")
    with pytest.raises(InputError, match=r"has no config\.json"):
        load_model(folder.parent)


def test_an_unfinished_run_names_its_latest_checkpoint(folder) -> None:
    weights = folder / "model.safetensors"
    for number in (100, 20):
        checkpoint = folder / "checkpoints" / f"checkpoint-{number}"
        checkpoint.mkdir(parents=True)
        shutil.copy(weights, checkpoint)
        shutil.copy(folder / "config.json", checkpoint)
    weights.unlink()
    with pytest.raises(InputError, match=r"not finished.*checkpoint-100, or .*--resume --out"):
        load_model(folder)
    load_model(folder / "checkpoints" / "checkpoint-100")
    assert load_model(folder, weights_required=False).model.config.hidden_size == 16


def test_no_weights_at_all(folder) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"no model\.safetensors"):
        load_model(folder)


def test_weights_that_do_not_fit(folder) -> None:
    fields = json.loads((folder / "config.json").read_text())
    for change in ({"hidden_size": 32, "slot_key_size": 32}, {"depth_step_embedding": True}):
        (folder / "config.json").write_text(json.dumps(fields | change))
        with pytest.raises(InputError, match="the weights in"):
            load_model(folder)


def test_damaged_files(folder) -> None:
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(InputError, match="cannot load the weights"):
        load_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"cannot read .*config\.json"):
        load_model(folder)


def test_a_model_of_another_kind(tmp_path) -> None:
    with quiet_transformers():
        LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="of type 'llama'"):
        load_config(tmp_path)


def test_a_later_format(folder) -> None:
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"format_version": 99}))
    with pytest.raises(InputError, match="format version 99"):
        load_model(folder)


def test_ids_that_are_no_bytes(tmp_path) -> None:
    model = build_model("core", dtype=torch.float32)
    loaded, tokenizer = load_model(save_model(tmp_path, model))
    assert tokenizer is None
    with pytest.raises(InputError, match="vocabulary of 23 ids"):
        require_byte_level(loaded, tmp_path)
    require_byte_level(build_byte_model(), "any")


def test_the_recipe_of_a_run(folder) -> None:
    assert find_run_recipe(folder) is None
    (folder / "recipe.json").write_text("{}")
    assert find_run_recipe(folder) == folder / "recipe.json"
    assert find_run_recipe(folder / "checkpoints" / "checkpoint-7") == folder / "recipe.json"
