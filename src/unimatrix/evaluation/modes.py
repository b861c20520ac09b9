"""Measuring leaves a model as it was."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def suspend_training(model: nn.Module) -> Iterator[None]:
    """Switch off dropout and gradients; every module gets its mode back afterwards.

    Args:
        model: whatever is measured.
    """
    trained = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in trained:
            module.training = True
