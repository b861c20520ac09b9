"""What every verb shares: option types, the choice of a device, and how a result is printed.

stdout carries the result and nothing else; progress, logs and errors go to stderr.
"""

import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from unimatrix.errors import InputError, require_choice
from unimatrix.hub.packaged import READER
from unimatrix.train.recipe import Recipe, override

if TYPE_CHECKING:
    from unimatrix.data import ByteStream

DEVICES = ("auto", "cpu", "cuda", "mps")

JsonOption = Annotated[
    bool, typer.Option("--json", help="Print the result as one line of JSON on stdout.")
]
DeviceOption = Annotated[
    str,
    typer.Option(
        "--device",
        help="auto, cpu, cuda or mps; auto takes CUDA, then MPS, then the CPU.",
        show_default=True,
    ),
]
SeedOption = Annotated[
    int | None, typer.Option("--seed", min=0, help="Seed of everything random; a whole number.")
]

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help=f"Run folder, checkpoint or saved model; or {READER}, the packaged model.",
    ),
]
PrimeOption = Annotated[
    list[str] | None,
    typer.Option(
        "--prime",
        help="Text that is read first: what a long memory may draw on. A suffix "
        "automaton reads all of it; where nothing else remembers, the rest of the model its last "
        "65,536 bytes. Repeatable.",
    ),
]
WindowOption = Annotated[
    int | None,
    typer.Option(
        "--window",
        help="Bytes that the index of the text or the suffix automaton remembers, the last of "
        "them; for an index even, at least 128. The weights are the same, the state is another. "
        "\\[default: the model's own]",
        show_default=False,
    ),
]


def make_log() -> Console:
    """Return a console on the present stderr, for everything that is not the result."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def pick_device(name: str) -> str:
    """Return the device that a ``--device`` name stands for here.

    Raises:
        InputError: for an unknown name, or a device that this machine does not have.
    """
    require_choice("unknown device", name, DEVICES)
    import torch

    present = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        return next(device for device, there in present.items() if there)
    if not present[name]:
        raise InputError(f"there is no {name} device here; use --device cpu.")
    return name


def open_prime(texts: list[str] | None) -> "ByteStream | None":
    """Open what ``--prime`` names as one text; of a corpus by name, its training split.

    Raises:
        InputError: if it cannot be opened, or is empty.
    """
    if not texts:
        return None
    from unimatrix.data import load_corpus

    return load_corpus(texts, texts).train


def emit(result: dict[str, Any], as_json: bool, render: Callable[[dict[str, Any]], str]) -> None:
    """Print a result on stdout."""
    sys.stdout.write((json.dumps(result) if as_json else render(result)) + "\n")
    sys.stdout.flush()


def compare_with_xz(bits_per_byte: float, xz: float, *, is_primed: bool) -> str:
    """Return a line with the bits per byte of a model and of xz, which reads nothing before."""
    verdict = "beaten" if bits_per_byte < xz else "not beaten"
    if is_primed:
        verdict = "which read nothing before"
    return f"bits per byte  {bits_per_byte:.4f}   (xz -9e: {xz:.4f}, {verdict})"


def parse_overrides(assignments: list[str]) -> dict[str, Any]:
    """Return configuration fields by name, of the types that the configuration declares.

    Raises:
        InputError: for an assignment without ``=``, an unknown field or an unusable value.
    """
    fields = [assignment.strip().removeprefix("model.") for assignment in assignments]
    for assignment in fields:
        name, equals, _ = assignment.partition("=")
        if not equals:
            raise InputError(f"{assignment!r} sets nothing; write FIELD=VALUE")
        if name.strip() in ("preset", "init"):
            raise InputError(f"--set {assignment} is no field of the configuration; use --preset")
    return override(Recipe(), [f"model.{field}" for field in fields]).model.overrides
