"""Models that come with this package, by name; the folder of each is a saved model."""

import os
from pathlib import Path
from typing import Any

from unimatrix.errors import InputError

READER = "unimatrix-reader"
"""The model of ``unimatrix ask``: it answers questions about a text."""
PACKAGED_MODELS = {READER: "reader"}
"""Names of models, and of their folders in ``pretrained_models``. No preset and no recipe has such
a name."""
FOLDER = Path(__file__).parents[1] / "pretrained_models"
_NEEDED = ("config.json", "model.safetensors")


def find_packaged(name: str | os.PathLike[str]) -> Path | None:
    """Return the folder of a model that comes with the package; ``None`` for any other name.

    A folder of that name in the working folder comes first, as it does with transformers.

    Raises:
        InputError: if this installation has no such weights.
    """
    known = os.fspath(name)
    if known not in PACKAGED_MODELS or os.path.isdir(known):
        return None
    folder = FOLDER / PACKAGED_MODELS[known]
    if known not in list_packaged():
        recipe = PACKAGED_MODELS[known]
        raise InputError(
            f"the weights of {known!r} are missing in this installation; train them with "
            f"`unimatrix train {recipe} --out DIR` and give DIR, or install the package again"
        )
    return folder


def list_packaged() -> list[str]:
    """Return the names of the models whose weights this installation has."""
    return [
        name
        for name, folder in PACKAGED_MODELS.items()
        if all((FOLDER / folder / file).is_file() for file in _NEEDED)
    ]


def replace_name(arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, ...]:
    """Return the arguments of a ``from_pretrained`` with the folder in place of a packaged name.

    Args:
        arguments: positional; the first is the name, if there is one.
        options: keywords, of which the name is replaced in place.

    Raises:
        InputError: as ``find_packaged``.
    """
    key = "pretrained_model_name_or_path"
    name = arguments[0] if arguments else options.get(key)
    folder = find_packaged(name) if isinstance(name, str) else None
    if folder is None:
        return arguments
    if arguments:
        return (str(folder), *arguments[1:])
    options[key] = str(folder)
    return arguments
