"""Folders and caches that version 0.1.0 saved load, and give the same logits."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.tolerances import error, limit
from unimatrix import UniMatrixCache, UniMatrixForCausalLM

FOLDER = Path(__file__).parent / "saved"
NAMES = sorted(path.name for path in FOLDER.iterdir())


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
