"""Logits, loss and every gradient against the published mathematics."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.ops import oracle
from tests.tolerances import error, limit
from unimatrix.hub.published import convert_name, from_published
from unimatrix.ops.backends import BACKENDS

FOLDER = Path(__file__).parent
FILES = sorted(path.stem for path in FOLDER.glob("*.safetensors"))


def read(name: str) -> tuple[dict, dict[str, torch.Tensor]]:
    with safe_open(FOLDER / f"{name}.safetensors", framework="pt") as file:
        config = json.loads(file.metadata()["config"])
        return config, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def list_backends(name: str) -> list[dict[str, str]]:
    """Return the choices of back ends that can run the file's preset."""
    config, _ = read(name)
    matrix = [
        b
        for b in oracle.list_backends("matrix_state")
        if not (config["use_spectral_norm"] and b == "parallel")
    ]
    choices = [{"matrix_state": backend} for backend in matrix]
    if config["use_assoc_memory"]:
        op = "slots" if config["use_sparse_pointer"] else "dense_memory"
        choices += [{op: backend} for backend in oracle.list_backends(op)]
    return [dict.fromkeys(BACKENDS, "auto"), *choices]


CASES = [
    pytest.param(
        name, backends, id=f"{name}-{'-'.join(sorted({*backends.values()}))}-{len(backends)}-{i}"
    )
    for name in FILES
    for i, backends in enumerate(list_backends(name))
]


def test_every_published_preset_has_a_file() -> None:
    assert len(FILES) == 15


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(("name", "backends"), CASES)
def test_golden(name: str, backends: dict[str, str], dtype: torch.dtype) -> None:
    config, tensors = read(name)
    params = {
        k.removeprefix("param/"): v.to(dtype) for k, v in tensors.items() if k.startswith("param/")
    }
    expected = {k.removeprefix("grad/"): v for k, v in tensors.items() if k.startswith("grad/")}
    model = from_published(config, params)
    model.set_backend(backends)

    output = model(tensors["input_ids"], labels=tensors["input_ids"])
    output.loss.backward()

    assert output.logits.dtype == dtype
    assert error(output.logits, tensors["logits"]) <= limit("golden", dtype, "value")
    assert error(output.loss.reshape(1), tensors["loss"]) <= limit("golden", dtype, "value")
    ours = dict(model.named_parameters())
    compared = set()
    for published, grad in expected.items():
        parameter = convert_name(published, model.config)
        assert ours[parameter].grad is not None, published
        found = error(ours[parameter].grad, grad)
        assert found <= limit("golden", dtype, "grad"), f"{published}: {found:.2e}"
        compared.add(parameter)
    surplus = {k for k, p in ours.items() if p.grad is not None and k not in compared}
    assert not surplus, f"gradients where the published mathematics has none: {surplus}"
