"""What a study draws from its seed: fresh weights, and tests apart from the training."""

from collections.abc import Callable
from typing import TypeVar

import torch
from transformers import PreTrainedModel

TEST_SEED_OFFSET = 2**32
"""Added to the seed of training, so that no test ever meets a training example."""

Model = TypeVar("Model", bound=PreTrainedModel)


def draw_model(build: Callable[[], Model], seed: int) -> Model:
    """Return a model with weights drawn from the seed, the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()
