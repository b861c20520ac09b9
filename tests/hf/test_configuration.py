"""What a configuration file may hold, and what a call may name."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from tests.models import SMALL, build_model
from unimatrix import UniMatrixConfig  # registers the Auto classes
from unimatrix.errors import InputError
from unimatrix.presets import PRESETS

NOTES = {"note": "v1", "quantization_notes": {"bits": 4}, "sources": ["a", "b"]}


def write_config(folder: Path, **extra: Any) -> Path:
    """Save a small configuration with further keys in its file; return the file."""
    UniMatrixConfig.preset("unimatrix", **SMALL).save_pretrained(folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | extra))
    return file


@pytest.mark.parametrize("preset", PRESETS)
def test_unknown_keys_of_a_file_are_kept(preset: str, tmp_path: Path) -> None:
    model = build_model(preset)
    for name, value in NOTES.items():
        setattr(model.config, name, value)
    model.save_pretrained(tmp_path / "first")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    loaded.save_pretrained(tmp_path / "second")
    file = tmp_path / "second" / "config.json"
    for config in (
        loaded.config,
        AutoConfig.from_pretrained(tmp_path / "second"),
        UniMatrixConfig.from_pretrained(file),
        UniMatrixConfig.from_json_file(file),
        UniMatrixConfig.from_dict(json.loads(file.read_text())),
    ):
        assert {name: getattr(config, name) for name in NOTES} == NOTES
        assert json.loads(config.to_json_string()) == json.loads(file.read_text())


def test_unknown_keys_of_a_call_raise(tmp_path: Path) -> None:
    write_config(tmp_path, note="v1")
    for call in (
        lambda: UniMatrixConfig(note="v1"),
        lambda: UniMatrixConfig.preset("core", note="v1"),
        lambda: AutoConfig.for_model("unimatrix", note="v1"),
        lambda: UniMatrixConfig.from_dict({}, remark="v1"),
        lambda: UniMatrixConfig.from_pretrained(tmp_path, remark="v1"),
        lambda: AutoConfig.from_pretrained(tmp_path, remark="v1"),
    ):
        with pytest.raises(InputError, match="unknown configuration key"):
            call()
    with pytest.raises(InputError, match="Did you mean 'hidden_size'"):
        AutoConfig.from_pretrained(tmp_path, hiden_size=3)
    # A name of this class is no field either.
    with pytest.raises(InputError, match="unknown configuration key 'preset'"):
        UniMatrixConfig.from_pretrained(tmp_path, preset="core")
    build_model("core").save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="remark"):
        AutoModelForCausalLM.from_pretrained(tmp_path, remark="v1")


def test_keywords_of_loading_a_model_are_taken(tmp_path: Path) -> None:
    """``transformers serve`` gives them to the configuration as well."""
    write_config(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path, device_map="cpu", tqdm_class=None, dtype="auto")
    assert not hasattr(config, "device_map")


def test_a_call_rules_over_the_file(tmp_path: Path) -> None:
    write_config(tmp_path, note="v1")
    config, unused = AutoConfig.from_pretrained(
        tmp_path, note="v2", dropout=0.25, remark=1, return_unused_kwargs=True, gguf_file=None
    )
    assert (config.note, config.dropout) == ("v2", 0.25)
    assert unused == {"remark": 1, "gguf_file": None}
    with pytest.raises(InputError, match="dropout is 3"):
        AutoConfig.from_pretrained(tmp_path, dropout=3)


def test_a_file_with_generation_parameters_loads_and_saves(tmp_path: Path) -> None:
    """They belong to transformers' generation configuration, which reads them there."""
    config = UniMatrixConfig.from_pretrained(write_config(tmp_path, temperature=0.5))
    assert not hasattr(config, "temperature")
    config.save_pretrained(tmp_path / "again")


def test_a_kept_key_near_a_field_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    UniMatrixConfig.from_json_file(write_config(tmp_path, hiden_size=3, note="v1"))
    assert caplog.text.count("is kept, but unused") == 1
    assert "Did you mean 'hidden_size'?" in caplog.text


@pytest.mark.parametrize("name", ["to_dict", "uses_pointer"])
def test_a_file_cannot_hide_a_part_of_the_class(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"holds '{name}'"):
        UniMatrixConfig.from_json_file(write_config(tmp_path, **{name: 1}))
