"""The back end of every operator of a model: chosen by name, or as ``auto`` would choose."""

from collections.abc import Callable
from typing import Any

import torch

from unimatrix.errors import InputError
from unimatrix.nn.mixer import Mixer
from unimatrix.nn.pointer_mixture import PointerMixture
from unimatrix.ops import indexed_attention, matrix_state, selective_slots, slots
from unimatrix.ops.backends import BACKENDS, compiles_native, require_backend

PASSES = "fused_passes"


def set_backend(model: Any, backend: str | dict[str, str]) -> None:
    """Choose the back end of every operator of a model; see ``set_backend`` of the models."""
    chosen = dict.fromkeys(BACKENDS, backend) if isinstance(backend, str) else dict(backend)
    if isinstance(backend, str) and backend not in ("auto", *BACKENDS[PASSES]):
        # Fused passes are no scan and have no other form: they stay as they are.
        del chosen[PASSES]
    mixers = [m for m in model.modules() if isinstance(m, Mixer | PointerMixture)]
    for op, name in chosen.items():
        if op not in BACKENDS:
            raise InputError(f"unknown operator {op!r}; choose from {', '.join(BACKENDS)}")
        users = [mixer for mixer in mixers if mixer.operator == op and mixer.runs_operator]
        if name != "auto" and (users or op == PASSES):
            require_backend(op, name)
        for mixer in users:
            others = {k: v for k, v in mixer.operator_options.items() if k != "backend"}
            mixer.operator_options = others if name == "auto" else others | {"backend": name}
        if op == PASSES:
            model.base_model.passes_backend = name


def name_backends(model: Any, num_tokens: int, device: torch.device) -> dict[str, str]:
    """Return the back end of every operator of a model; see ``name_backends`` of the models."""
    chosen = {}
    for mixer in model.base_model.mixers:
        if mixer.runs_operator:
            name = mixer.operator_options.get("backend", "auto")
            if name == "auto":
                choose = _CHOICES.get(mixer.operator, _choose_fastest)
                name = choose(mixer, num_tokens, device)
            chosen[mixer.operator] = name
    chosen[PASSES] = model.base_model.passes_backend
    if chosen[PASSES] == "auto":
        is_native = device.type == "cpu" and num_tokens > 1 and compiles_native()
        chosen[PASSES] = "native" if is_native else "reference"
    return chosen


def _choose_fastest(mixer: Any, num_tokens: int, device: torch.device) -> str:
    """Return an operator's last back end that runs anywhere: the others come before it."""
    names = [name for name in BACKENDS[mixer.operator] if name != "triton"]
    return names[-1] if names[-1] != "native" or compiles_native() else "reference"


_CHOICES: dict[str, Callable[[Any, int, torch.device], str]] = {
    "matrix_state": lambda mixer, num_tokens, device: matrix_state.choose_backend(
        num_tokens,
        device,
        norm_guard=mixer.norm_guard,
        is_delta=mixer.uses_delta,
        head_dim=mixer.head_dim,
        is_double=mixer.retention_proj.weight.dtype == torch.float64,
    ),
    "slots": lambda mixer, num_tokens, device: slots.choose_backend(
        device, num_tokens, mixer.num_slots, mixer.key_size
    ),
    # Of 16-bit weights the mixer makes float32.
    "indexed_attention": lambda _, num_tokens, device: indexed_attention.choose_backend(
        "auto", torch.empty(0, device=device)
    ),
    "selective_slots": lambda mixer, _, device: selective_slots.choose_backend(
        device, mixer.num_slots, bounded=mixer.bounded_training or not mixer.training
    ),
}
