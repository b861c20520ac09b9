"""Folders and caches that version 0.1.0 saved load, and give the same logits."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.tolerances import error, limit
from unimatrix import UniMatrixCache, UniMatrixForCausalLM
from unimatrix.errors import InputError

FOLDER = Path(__file__).parent / "saved"
# Saved with an automaton that kept up to twice its window.
WITH_WINDOW = "selective"
NAMES = sorted(path.name for path in FOLDER.iterdir() if path.name != WITH_WINDOW)


def edit_config(folder: Path, **fields: object) -> Path:
    """Return a copy of the folder with a window, other fields in its configuration."""
    copy = folder / "copy"
    shutil.copytree(FOLDER / WITH_WINDOW, copy, dirs_exist_ok=True)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | fields))
    return copy


@pytest.mark.parametrize("name", NAMES)
def test_saved_model_gives_the_logits_that_it_gave(name: str) -> None:
    model = UniMatrixForCausalLM.from_pretrained(FOLDER / name).eval()
    expected = load_file(FOLDER / name / "expected.safetensors")
    found = model(expected["input_ids"]).logits
    assert error(found, expected["logits"]) <= limit("golden", torch.float32, "value")


@pytest.mark.parametrize("name", NAMES)
def test_saved_cache_goes_on_where_it_was(name: str) -> None:
    model = UniMatrixForCausalLM.from_pretrained(FOLDER / name).eval()
    expected = load_file(FOLDER / name / "expected.safetensors")
    with pytest.warns(UserWarning, match="does not say which weights made it"):
        cache = UniMatrixCache.load(FOLDER / name / "cache.safetensors")
    rest = expected["input_ids"][:, cache.num_columns :]
    found = model(rest, past_key_values=cache).logits
    after = expected["logits"][:, cache.num_columns :]
    assert error(found, after) <= limit("golden", torch.float32, "value")


def test_a_window_of_version_1_is_refused_with_the_way_on(tmp_path: Path) -> None:
    expected = load_file(FOLDER / WITH_WINDOW / "expected.safetensors")
    with pytest.raises(InputError, match="automaton_window=32 tokens; set format_version to 2"):
        UniMatrixForCausalLM.from_pretrained(FOLDER / WITH_WINDOW)
    # Nothing had left the window: without one the logits are those that it gave.
    model = UniMatrixForCausalLM.from_pretrained(edit_config(tmp_path, automaton_window=None))
    found = model.eval()(expected["input_ids"]).logits
    assert error(found, expected["logits"]) <= limit("golden", torch.float32, "value")

    model = UniMatrixForCausalLM.from_pretrained(edit_config(tmp_path, format_version=2)).eval()
    assert model(expected["input_ids"]).logits.isfinite().all()
    with pytest.warns(UserWarning, match="does not say which weights made it"):
        cache = UniMatrixCache.load(FOLDER / WITH_WINDOW / "cache.safetensors")
    with pytest.raises(InputError, match="another kind of automaton, as earlier releases had"):
        model(expected["input_ids"][:, :3], past_key_values=cache)
