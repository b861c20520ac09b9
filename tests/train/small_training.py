"""A model and a corpus small enough to train inside a test."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from unimatrix.configuration import UniMatrixConfig
from unimatrix.data import ByteStream, WindowDataset
from unimatrix.modeling import UniMatrixForCausalLM
from unimatrix.train.recipe import DataSection, EvalSection, ModelSection, Recipe, TrainSection

WINDOW_TOKENS = 16
OVERRIDES: dict[str, Any] = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": None,
    "residual_path": "suffix_automaton",
    "dropout": 0.3,
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Train on one thread: waking others costs more than all the work there is."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build_model(**overrides: Any) -> UniMatrixForCausalLM:
    """Return the small model with weights that every call draws alike."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UniMatrixForCausalLM(UniMatrixConfig.preset("core", **(OVERRIDES | overrides)))


def build_dataset(num_windows: int, seed: int = 0) -> WindowDataset:
    """Return windows of a text made of words."""
    stream = ByteStream.from_bytes(build_text(), name="words")
    return WindowDataset(stream, WINDOW_TOKENS, num_windows, seed)


def build_text(num_words: int = 2000) -> bytes:
    """Return words in an order that is always the same."""
    words = [b"alpha", b"beta", b"gamma", b"delta"]
    return b" ".join(words[i] for i in np.random.default_rng(0).integers(0, 4, num_words))


def build_settings(**fields: Any) -> TrainSection:
    """Return settings of a few steps."""
    return TrainSection(**({"steps": 6, "batch_size": 4, "log_every_steps": 1} | fields))


def build_recipe(folder: Path, **train: Any) -> Recipe:
    """Return a recipe for the small model on a corpus file written to ``folder``."""
    corpus = folder / "corpus.txt"
    corpus.write_bytes(build_text())
    return Recipe(
        model=ModelSection(preset="core", overrides=OVERRIDES),
        data=DataSection(data=(str(corpus),), window_tokens=WINDOW_TOKENS),
        train=build_settings(**train),
        eval=EvalSection(prefix_bytes=200, sample_bytes=5),
    )


def have_equal_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    """Whether two models hold the same bits."""
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)
