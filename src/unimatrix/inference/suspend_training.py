"""Switch a model to evaluation without gradients, and back."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

_LOCK = threading.Lock()
# The models in use now: by how many threads, and which modules were in training mode before.
_suspended: dict[nn.Module, tuple[int, list[nn.Module]]] = {}


@contextmanager
def suspend_training(model: nn.Module) -> Iterator[None]:
    """Switch off dropout and gradients; every module gets its mode back afterwards.

    If several threads use one model, the last of them restores the modes.
    """
    with _LOCK:
        trained = [module for module in model.modules() if module.training]
        count, trained = _suspended.get(model, (0, trained))
        _suspended[model] = count + 1, trained
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        with _LOCK:
            count, trained = _suspended.pop(model)
            if count > 1:
                _suspended[model] = count - 1, trained
            else:
                for module in trained:
                    module.training = True
