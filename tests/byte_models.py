"""Small byte-level models on disk and a toy one, for tests of whatever reads and writes bytes."""

import contextlib
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from unimatrix.configuration import UniMatrixConfig
from unimatrix.modeling import UniMatrixForCausalLM

SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "head_dim": 6,
    "num_hidden_layers": 2,
    "max_position_embeddings": None,
}


def build_byte_model(preset: str = "core", *, seed: int = 0, **overrides: Any):
    """Return a small model of the byte vocabulary in float32, its weights drawn from ``seed``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = UniMatrixForCausalLM(UniMatrixConfig.preset(preset, **(SMALL | overrides)))
        with torch.no_grad():
            model.model.embed_tokens.weight.normal_(std=0.5)
    return model.eval()


def save_model(folder: Path, model: UniMatrixForCausalLM) -> str:
    """Save a model without progress bars and return its folder."""
    with quiet_transformers():
        model.save_pretrained(folder)
    return str(folder)


@contextlib.contextmanager
def quiet_transformers():
    """Keep the progress bars of transformers off stderr."""
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def prefer(model: UniMatrixForCausalLM, token_id: int) -> UniMatrixForCausalLM:
    """Make ``token_id`` by far the most likely one, whatever comes before, and return the model."""
    with torch.no_grad():
        favourite = model.model.embed_tokens.weight[token_id]
        favourite *= 10 / favourite.norm()
        model.model.norm.weight.zero_()
        model.model.norm.bias.copy_(favourite)
    return model
