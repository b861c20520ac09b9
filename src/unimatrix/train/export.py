"""The weights of a finished run as a model that comes with the package.

``python -m unimatrix.train.export RUN`` writes them; ``just reader`` trains them first.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from unimatrix.errors import InputError, RunError, require_choice
from unimatrix.hub.load import hide_progress, load_byte_model
from unimatrix.hub.packaged import FOLDER, PACKAGED_MODELS, READER
from unimatrix.tokenization import build_tokenizer
from unimatrix.train.recipe import Recipe
from unimatrix.train.run_folder import create_folder, read_run, write_file, write_json

TRAINING_FILE = "training.json"
MOST_BYTES = 2_000_000
"""Weights that the package carries are no larger."""
DTYPES = {"float32": torch.float32, "float16": torch.float16}
_COPIED = ("generation_config.json", "model.safetensors", "tokenizer.json")
_LOADED_BY_NAME = ("config.json", "tokenizer_config.json")


def export_run(run: Path, folder: Path, dtype: str = "float32") -> int:
    """Write the model of a finished run into a folder, without the history of its training.

    ``training.json`` says what made the weights: recipe and record, with the names of files in
    place of their paths.

    Args:
        run: a run folder.
        folder: to create, or an export to replace.
        dtype: of the stored weights, ``float32`` or ``float16``; they are loaded as float32.

    Returns:
        the bytes of the weights.

    Raises:
        InputError: if the run is not finished, its weights are larger than ``MOST_BYTES``, or the
            folder holds something else.
        WriteError: if it cannot be written.
    """
    require_choice("dtype is", dtype, DTYPES)
    recipe, record = read_run(run)
    if record["status"] != "done":
        raise InputError(
            f"{run} is a run that has not finished; finish it with `unimatrix train --resume --out "
            f"{run}`"
        )
    model = load_byte_model(run)
    with TemporaryDirectory(prefix="unimatrix-") as temporary, hide_progress():
        model.to(DTYPES[dtype]).save_pretrained(temporary)
        build_tokenizer().save_pretrained(temporary)
        made = {name: (Path(temporary) / name).read_bytes() for name in _COPIED}
        settings = {
            name: json.loads((Path(temporary) / name).read_text()) for name in _LOADED_BY_NAME
        }
    num_bytes = len(made["model.safetensors"])
    if num_bytes > MOST_BYTES:
        raise InputError(
            f"the weights of {run} take {num_bytes:,} bytes as {dtype} and the package carries at "
            f"most {MOST_BYTES:,}; export float16, or train a smaller model"
        )
    if (folder / TRAINING_FILE).is_file():
        shutil.rmtree(folder)
    with create_folder(folder):
        for name, content in made.items():
            write_file(folder / name, content)
        for name, values in settings.items():
            # The package itself is what would be loaded by the file that this names.
            values.pop("auto_map", None)
            values |= {"dtype": "float32"} if name == "config.json" else {}
            write_json(folder / name, values)
        write_json(folder / TRAINING_FILE, _describe_training(recipe, record))
    (folder / ".lock").unlink(missing_ok=True)
    return num_bytes


def _describe_training(recipe: Recipe, record: dict[str, Any]) -> dict[str, Any]:
    """Return recipe and record without paths of the machine that trained."""
    values = recipe.to_dict()
    for name in ("data", "valid_data"):
        values["data"][name] = [Path(spec).name for spec in values["data"][name]]
    if recipe.model.init is not None:
        values["model"]["init"] = Path(recipe.model.init).name
    corpus = {**record["corpus"], "name": ", ".join(values["data"]["data"])}
    return {"recipe": values, "record": {**record, "corpus": corpus}}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line, and return its exit code: 0, 1 if writing failed, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m unimatrix.train.export", description=__doc__)
    parser.add_argument("run", type=Path, help="run folder of the training")
    parser.add_argument("--name", default=READER, help="of the model, %(default)s")
    parser.add_argument("--dtype", default="float32", help="of the stored weights, %(default)s")
    chosen = parser.parse_args(arguments)
    try:
        require_choice("there is no packaged model", chosen.name, PACKAGED_MODELS)
        folder = FOLDER / PACKAGED_MODELS[chosen.name]
        num_bytes = export_run(chosen.run, folder, chosen.dtype)
    except (InputError, RunError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2 if isinstance(error, InputError) else 1
    sys.stdout.write(f"{chosen.name}: {num_bytes:,} bytes of weights in {folder}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
