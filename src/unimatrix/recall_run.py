"""A recall experiment from recipe to accuracies."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from unimatrix.checkpoints import hide_progress
from unimatrix.configuration import UniMatrixConfig
from unimatrix.errors import InputError
from unimatrix.evaluation.footprint import measure_state_bytes
from unimatrix.evaluation.recall import measure_recall
from unimatrix.modeling import UniMatrixForCausalLM
from unimatrix.recall_recipe import RecallRecipe
from unimatrix.recipe import ModelSection, Recipe
from unimatrix.run_folder import create_run_folder, start_record, write_record
from unimatrix.tasks import AssociativeRecall
from unimatrix.training import train_model

# Added to the seed, so that no test ever meets a training example.
_TEST_SEED_OFFSET = 2**32


def build_recall_config(recipe: RecallRecipe) -> UniMatrixConfig:
    """Return the configuration of the model that a recall recipe trains.

    Raises:
        InputError: for an unknown preset, an unusable value, or slots on a preset without slots.
    """
    task = AssociativeRecall(num_pairs=recipe.num_pairs)
    fields: dict[str, Any] = {
        "vocab_size": task.vocab_size,
        "max_position_embeddings": task.window_tokens,
        "pad_token_id": task.PAD_ID,
        "bos_token_id": task.BOS_ID,
        "eos_token_id": None,
        "dropout": recipe.dropout,
        **recipe.overrides,
    }
    config = UniMatrixConfig.preset(recipe.preset, **fields)
    if recipe.num_slots is None:
        return config
    if config.associative_memory != "slots":
        raise InputError(
            f"slots is {recipe.num_slots} and preset {recipe.preset!r} has no slots; choose preset "
            "sparsepointer, or leave slots out"
        )
    return UniMatrixConfig.preset(recipe.preset, **(fields | {"num_slots": recipe.num_slots}))


def run_recall(
    recipe: RecallRecipe,
    *,
    out: Path | None = None,
    device: str = "cpu",
    callbacks: Sequence[TrainerCallback] = (),
    on_metrics: Callable[[dict[str, float]], None] | None = None,
) -> dict[str, Any]:
    """Train on associative recall and test it.

    Args:
        recipe: what to do; the same recipe gives the same numbers on the same machine.
        out: folder for the model, its log and the record; ``None`` keeps nothing.
        device: cpu, cuda or mps.
        callbacks, on_metrics: as in ``train_model``.

    Returns:
        ``accuracy`` by number of pairs (a fraction), ``parameters``, ``state_bytes`` at batch 1,
        ``train_s`` and the ``recipe``, as JSON types.

    Raises:
        InputError: for an unusable recipe or folder, before anything is written.
    """
    model = _draw_model(recipe)
    if out is not None:
        create_run_folder(out, "recall")
    task, num_examples = AssociativeRecall(recipe.num_pairs), recipe.steps * recipe.batch_size
    trained = train_model(
        model,
        task.dataset(recipe.seed, num_examples),
        recipe.to_train_section(),
        out,
        callbacks=callbacks,
        device=device,
        on_metrics=on_metrics,
    )
    result = _test(model.to(device), recipe, trained.train_s)
    if out is not None:
        _keep(model, result, recipe, out, device)
    return result


def _check(recipe: RecallRecipe) -> None:
    """Raise ``InputError`` for what would stop the run after its first writing."""
    recipe.to_train_section()
    for num_pairs in recipe.test_pairs:
        AssociativeRecall(num_pairs=num_pairs)
    if recipe.test_examples < 1:
        raise InputError(f"test_examples is {recipe.test_examples}; it must be at least 1")


def _test(model: UniMatrixForCausalLM, recipe: RecallRecipe, train_s: float) -> dict[str, Any]:
    """Return what ``run_recall`` returns for a model trained in so many seconds."""
    test_seed = recipe.seed + _TEST_SEED_OFFSET
    accuracy = {
        str(num_pairs): measure_recall(
            model, AssociativeRecall(num_pairs=num_pairs), recipe.test_examples, test_seed
        )
        for num_pairs in recipe.test_pairs
    }
    return {
        "accuracy": accuracy,
        "parameters": model.num_parameters(),
        "state_bytes": sum(measure_state_bytes(model).values()),
        "train_s": round(train_s, 3),
        "recipe": {"task": "associative", **dataclasses.asdict(recipe)},
    }


def _draw_model(recipe: RecallRecipe) -> UniMatrixForCausalLM:
    """Check the recipe; return the model with fresh weights, the global generator as it was."""
    _check(recipe)
    config = build_recall_config(recipe)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return UniMatrixForCausalLM(config)


def _keep(
    model: UniMatrixForCausalLM,
    result: dict[str, Any],
    recipe: RecallRecipe,
    out: Path,
    device: str,
) -> None:
    """Save the model and the record of how it came about."""
    settings = Recipe(model=ModelSection(preset=recipe.preset), train=recipe.to_train_section())
    with hide_progress():
        model.save_pretrained(out)
    record = start_record(settings, model.config.to_dict(), device)
    write_record(out, record | {"status": "done", "results": result})
