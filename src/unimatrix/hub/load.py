"""Load and save models by name: a run folder, a saved model, a packaged model or a preset."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from unimatrix.configuration import UniMatrixConfig
from unimatrix.errors import InputError, explain, suggest
from unimatrix.hub.auto import register
from unimatrix.hub.packaged import find_packaged, list_packaged
from unimatrix.modeling import UniMatrixForCausalLM
from unimatrix.presets import PRESETS
from unimatrix.tokenization import BOS_ID, EOS_ID, VOCAB_SIZE, UniMatrixTokenizer, build_tokenizer
from unimatrix.train.checkpoints import SCRATCH_FOLDER, list_checkpoints
from unimatrix.train.run_folder import (
    CHECKPOINT_FOLDER,
    RECIPE_FILE,
    RECORD_FILE,
    is_in_use,
    require_unicode_path,
    writing,
)

CONFIG_FILE = "config.json"
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")

Name = str | os.PathLike[str]


class LoadedModel(NamedTuple):
    """A model in evaluation mode, and its tokenizer where its vocabulary is bytes."""

    model: UniMatrixForCausalLM
    tokenizer: PreTrainedTokenizerBase | None


def load_model(
    name_or_path: Name, *, device: torch.device | str = "cpu", weights_required: bool = True
) -> LoadedModel:
    """Load what ``unimatrix train`` or ``save_pretrained`` wrote, or build a preset.

    Args:
        name_or_path: a run folder, a saved model or a checkpoint; the name of a model that comes
            with the package (``hub/packaged.py``); or a preset, if weights are not required. A
            folder comes before anything else of the same name.
        weights_required: refuse a model without trained weights; otherwise it gets fresh ones.

    Returns:
        the model in the dtype it was saved in, and the tokenizer (``None`` if ids are no bytes).

    Raises:
        InputError: if there is no such model, or it is damaged, incomplete or of another kind.
    """
    config = load_config(name_or_path)
    folder = _find_folder(name_or_path)
    if folder is not None:
        require_unicode_path(folder)
    if folder is not None and _has_weights(folder):
        model = _load_weights(folder)
    elif weights_required:
        raise _explain_no_weights(name_or_path, folder)
    else:
        model = UniMatrixForCausalLM(config)
    tokenizer = _load_tokenizer(folder) if is_byte_level(config) else None
    return LoadedModel(model.to(device).eval(), tokenizer)


def load_byte_model(
    name_or_path: Name, *, device: torch.device | str = "cpu"
) -> UniMatrixForCausalLM:
    """Load a trained model of bytes; arguments and errors as ``load_model``."""
    model = load_model(name_or_path, device=device).model
    require_byte_level(model, name_or_path)
    return model


def load_config(name_or_path: Name) -> UniMatrixConfig:
    """Return the configuration of a run folder, a saved or packaged model, or a preset."""
    folder = _find_folder(name_or_path)
    if folder is not None:
        _check_config(folder)
        config: UniMatrixConfig = UniMatrixConfig.from_pretrained(folder)
        return config
    name = os.fspath(name_or_path)
    if name in PRESETS:
        return UniMatrixConfig.preset(name)
    raise _explain_missing(Path(name))


def require_byte_level(model: UniMatrixForCausalLM, name_or_path: Name) -> None:
    """Raise ``InputError`` unless the model's ids are bytes, PAD, BOS and EOS."""
    if not is_byte_level(model.config):
        raise InputError(
            f"{os.fspath(name_or_path)!r} has a vocabulary of {model.config.vocab_size} ids that "
            f"are no bytes; give a model with the byte vocabulary of {VOCAB_SIZE}"
        )


def find_run_recipe(name_or_path: Name) -> Path | None:
    """Return the path of the recipe of a run folder, or of a checkpoint, if there is one."""
    folder = Path(name_or_path).expanduser().absolute()
    run = folder.parents[1] if folder.parent.name == CHECKPOINT_FOLDER else folder
    path = run / RECIPE_FILE
    return path if path.is_file() else None


def _find_folder(name_or_path: Name) -> Path | None:
    path = Path(name_or_path).expanduser()
    return path if (path / CONFIG_FILE).is_file() else find_packaged(name_or_path)


def _has_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for name in WEIGHT_FILES)


def is_byte_level(config: UniMatrixConfig) -> bool:
    """Whether a model's ids are bytes, PAD, BOS and EOS."""
    special_ids = (config.bos_token_id, config.eos_token_id)
    return config.vocab_size >= VOCAB_SIZE and special_ids == (BOS_ID, EOS_ID)


def _check_config(folder: Path) -> None:
    """Raise ``InputError`` unless the folder's configuration is one of ours."""
    path = folder / CONFIG_FILE
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {str(path)!r}: {error}") from error
    kind = fields.get("model_type") if isinstance(fields, dict) else None
    if kind != UniMatrixConfig.model_type:
        raise InputError(
            f"{str(folder)!r} holds a model of type {kind!r}; give one that unimatrix saved"
        )


def _load_weights(folder: Path) -> UniMatrixForCausalLM:
    """Load a saved model; refuse weights that do not fit, which ``from_pretrained`` would not."""
    try:
        with hide_progress():
            model, report = UniMatrixForCausalLM.from_pretrained(folder, output_loading_info=True)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise InputError(f"cannot load the weights in {str(folder)!r}: {explain(error)}") from error
    unfit = sorted({*report["missing_keys"], *report["unexpected_keys"]})
    if unfit:
        raise InputError(
            f"the weights in {str(folder)!r} do not fit its {CONFIG_FILE}: {unfit[0]!r}"
            + (f" and {len(unfit) - 1} more are" if unfit[1:] else " is")
            + " missing or not used; save the model again"
        )
    loaded: UniMatrixForCausalLM = model
    return loaded


def _load_tokenizer(folder: Path | None) -> PreTrainedTokenizerBase:
    if folder is None or not (folder / "tokenizer_config.json").is_file():
        return build_tokenizer()
    register()
    tokenizer: PreTrainedTokenizerBase = UniMatrixTokenizer.from_pretrained(folder)
    return tokenizer


def _explain_no_weights(name_or_path: Name, folder: Path | None) -> InputError:
    name = os.fspath(name_or_path)
    if folder is None:
        return InputError(
            f"{name!r} is a preset, which has no trained weights; train one with `unimatrix train "
            f"--preset {name} --out DIR` and give DIR"
        )
    checkpoints = [p for _, p in list_checkpoints(folder / CHECKPOINT_FOLDER) if _has_weights(p)]
    if not checkpoints and not (folder / RECORD_FILE).is_file():
        return InputError(f"{name!r} has a {CONFIG_FILE} and no {WEIGHT_FILES[0]}; save it again")
    where = f"give its latest checkpoint, {checkpoints[-1]}" if checkpoints else "wait for its end"
    if is_in_use(folder):
        return InputError(f"{name!r} is a run that is still training; {where}")
    finish = f"finish it with `unimatrix train --resume --out {name}`"
    return InputError(
        f"{name!r} is a run that has not finished; {f'{where}, or ' if checkpoints else ''}{finish}"
    )


def _explain_missing(path: Path) -> InputError:
    if path.is_file():
        return InputError(f"{str(path)!r} is a file; give the folder of a run or of a saved model")
    if path.is_dir():
        return InputError(
            f"{str(path)!r} has no {CONFIG_FILE}; give the folder of a run or of a saved model"
        )
    parent = path.parent
    folders = [str(entry) for entry in parent.iterdir()] if parent.is_dir() else []
    packaged = list_packaged()
    also = f", and {', '.join(packaged)} comes with the package" if packaged else ""
    return InputError(
        f"there is no run folder, saved model or preset {str(path)!r}; the presets are "
        f"{', '.join(PRESETS)}{also}.{suggest(str(path), [*PRESETS, *packaged, *folders])}"
    )


def save_model(model: PreTrainedModel, folder: Path) -> None:
    """Save a model into a folder, each file whole or not at all.

    Raises:
        WriteError: if it cannot be written; what was there stays.
    """
    scratch = folder / SCRATCH_FOLDER
    shutil.rmtree(scratch, ignore_errors=True)
    with hide_progress(), writing(f"the model into {folder}", folder.parent):
        try:
            model.save_pretrained(scratch)
            for file in scratch.iterdir():
                os.replace(file, folder / file.name)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def hide_progress() -> Iterator[None]:
    """Keep the progress bars of transformers off the terminal."""
    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()
