"""A saved folder loads where nobody has imported the package, and says what it needs."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.byte_models import build_byte_model, quiet_transformers, save_model
from unimatrix import UniMatrixForCausalLM, UniMatrixTokenizer, build_tokenizer

FILES = {
    "config.json",
    "generation_config.json",
    "load_unimatrix.py",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}
# A process that has never imported the package. Every block is a client that loads by path.
STRANGER = """
import sys
folder, again, tokenizer_alone = sys.argv[1:]
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline
for auto_class in (AutoModelForCausalLM, AutoTokenizer):
    try:
        auto_class.from_pretrained(folder)
    except ValueError as error:
        assert "trust_remote_code=True" in str(error), error
    else:
        raise AssertionError("loaded something without the package")
assert "unimatrix" not in sys.modules

from transformers.cli.serving.model_manager import ModelManager
manager = ModelManager(device="cpu", trust_remote_code=True)
model, tokenizer = manager.load_model_and_processor(f"{folder}@main")
assert manager.get_model_modality(model).name == "LLM"
manager.shutdown()

trusted = {"trust_remote_code": True}
for auto_class, name in (
    (AutoConfig, "UniMatrixConfig"),
    (AutoModel, "UniMatrixModel"),
    (AutoModelForCausalLM, "UniMatrixForCausalLM"),
    (AutoTokenizer, "UniMatrixTokenizer"),
):
    loaded = auto_class.from_pretrained(folder, **trusted)
    assert type(loaded).__name__ == name
    assert type(loaded).__module__.startswith("unimatrix.")
assert len(AutoTokenizer.from_pretrained(tokenizer_alone, **trusted)("<|bos|>").input_ids) == 8
writer = pipeline("text-generation", model=folder, device="cpu", **trusted)
assert writer("ab", max_new_tokens=2)[0]["generated_text"].startswith("ab")
model.save_pretrained(again)
tokenizer.save_pretrained(again)
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    save_model(tmp_path / "model", build_byte_model("sparsepointer"))
    build_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_the_files_of_a_saved_model(folder) -> None:
    assert set(os.listdir(folder)) == FILES


def test_known_after_an_import_without_trust(folder) -> None:
    with quiet_transformers():
        loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert type(loaded) is UniMatrixForCausalLM
    assert type(AutoTokenizer.from_pretrained(folder)) is UniMatrixTokenizer
    ids = torch.tensor([[257, 97, 98]])
    assert torch.allclose(loaded(ids).logits, build_byte_model("sparsepointer")(ids).logits)


def test_folders_of_before_load_and_gain_the_file(folder, tmp_path) -> None:
    (folder / "load_unimatrix.py").unlink()
    config = AutoConfig.from_pretrained(folder)
    del config.auto_map
    config.to_json_file(folder / "config.json")
    with quiet_transformers():
        AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/load_unimatrix.py").is_file()
    assert "load_unimatrix" in (tmp_path / "again/config.json").read_text()


def test_strangers_load_it_offline(folder, tmp_path) -> None:
    again, alone = tmp_path / "again", tmp_path / "tokenizer"
    build_tokenizer().save_pretrained(alone)
    places = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, folder, again, alone],
        env=os.environ | places,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    # The classes came through the file, and are saved as they are otherwise.
    assert set(os.listdir(again)) == FILES


def test_trl_loads_it_by_path(folder) -> None:
    utils = pytest.importorskip("trl.trainer.utils", reason="needs trl")
    with quiet_transformers():
        model = utils.create_model_from_path(str(folder), dtype="float32")
    assert type(model) is UniMatrixForCausalLM


def test_a_missing_package_is_named(folder, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "unimatrix", None)
    with pytest.raises(ImportError, match="pip install unimatrix-lm"):
        runpy.run_path(str(folder / "load_unimatrix.py"))
