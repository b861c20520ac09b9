"""A recall experiment from recipe to accuracies."""

import contextlib
import dataclasses
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from transformers import TrainerCallback

from unimatrix.configuration import UniMatrixConfig
from unimatrix.errors import InputError
from unimatrix.evaluation.copy_rules import measure_copy_rules
from unimatrix.evaluation.footprint import measure_state_bytes
from unimatrix.evaluation.recall import measure_recall
from unimatrix.hub.load import save_model
from unimatrix.modeling import UniMatrixForCausalLM
from unimatrix.ops.text_index.state import require_window
from unimatrix.studies.engine import Attempt, FolderStore, StudyCell, run_cell
from unimatrix.studies.recall.recipe import RecallRecipe
from unimatrix.studies.recall.slices import RecallSlices, build_slices, count_pairs
from unimatrix.studies.records import Record
from unimatrix.studies.seeds import TEST_SEED_OFFSET, draw_model
from unimatrix.tasks import AssociativeRecall, RotatingDataset, SeededTask
from unimatrix.train.recipe import ModelSection, Recipe
from unimatrix.train.run_folder import create_folder, require_unicode_path, start_record

_BYTE_VOCAB_SIZE = 259
_COPY_RULE_EXAMPLES = 200
_ANY_LENGTH = ("selective", "unimatrix")
# Copy rules read the whole example in Python.
_LONGEST_COPIED_TOKENS = 20_000
# A test of longer examples takes fewer at a time; the longest are read in pieces.
_TOKENS_PER_BATCH = 2**17
_FEWEST_PER_BATCH, _MOST_PER_BATCH = 4, 64


def describe_vocabulary(task: AssociativeRecall) -> dict[str, Any]:
    """Return the configuration fields that a task's ids need."""
    ids = {"pad_token_id": task.PAD_ID, "bos_token_id": task.BOS_ID, "eos_token_id": None}
    return {"vocab_size": task.vocab_size} | ids


def build_recall_config(recipe: RecallRecipe, slices: RecallSlices) -> UniMatrixConfig:
    """Return the configuration of the model that a recall recipe trains.

    Raises:
        InputError: for an unknown preset, an unusable value, or slots on a preset without slots.
    """
    task = slices.train[0]
    fields: dict[str, Any] = {"vocab_size": task.vocab_size, "dropout": recipe.dropout}
    if isinstance(task, AssociativeRecall):
        fields |= describe_vocabulary(task) | {"max_position_embeddings": task.window_tokens}
    elif task.vocab_size != _BYTE_VOCAB_SIZE:
        fields |= {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    if recipe.preset in _ANY_LENGTH:
        fields["max_position_embeddings"] = None
    fields |= recipe.overrides
    config = UniMatrixConfig.preset(recipe.preset, **fields)
    if recipe.num_slots is None:
        return config
    if config.associative_memory not in ("slots", "selective"):
        raise InputError(
            f"slots is {recipe.num_slots} and preset {recipe.preset!r} has no slots in "
            f"{recipe.task} (associative_memory={config.associative_memory!r}); leave slots out"
        )
    return UniMatrixConfig.preset(recipe.preset, **(fields | {"num_slots": recipe.num_slots}))


def run_recall(
    recipe: RecallRecipe,
    *,
    out: Path | None = None,
    device: str = "cpu",
    callbacks: Sequence[TrainerCallback] = (),
    on_metrics: Callable[[dict[str, float]], None] | None = None,
    on_test: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Train on a recall task and test it.

    Args:
        recipe: what to do; the same recipe gives the same numbers on the same machine.
        out: folder for the model, its log and the record; ``None`` keeps nothing.
        device: cpu, cuda or mps.
        callbacks, on_metrics: as in ``train_model``.
        on_test: called with the name of each test before it is run.

    Returns:
        ``task``, ``accuracy`` by test (a fraction), their ``mean_accuracy``, ``copy_rules`` by
        test, ``parameters``, ``state_bytes`` at batch 1 and ``state_bytes_by_part``, ``train_s``
        and the ``recipe``, as JSON types; with ``test_kept`` also ``kept``, a list of
        ``automaton_window``, ``state_bytes``, ``accuracy`` and ``mean_accuracy``.

    Raises:
        InputError: for an unusable recipe or folder, before anything is written.
    """
    cell = RecallCell.prepare("", recipe, on_test)
    if out is not None:
        require_unicode_path(out)
    attempt = Attempt(device=device, callbacks=callbacks, on_metrics=on_metrics)
    with contextlib.nullcontext() if out is None else create_folder(out):
        results: dict[str, Any] = run_cell(cell, FolderStore(out), attempt)["results"]
    return results


@dataclass(frozen=True, kw_only=True)
class RecallCell(StudyCell):
    """A recall recipe that is checked, with the model that it trains."""

    recipe: RecallRecipe
    slices: RecallSlices
    model: UniMatrixForCausalLM
    on_test: Callable[[str], None]

    @classmethod
    def prepare(
        cls, name: str, recipe: RecallRecipe, on_test: Callable[[str], None] = lambda _: None
    ) -> Self:
        """Return the cell of a recipe, of which everything is checked; nothing is written.

        Raises:
            InputError: for an unusable recipe.
        """
        slices = build_slices(recipe)
        config = build_recall_config(recipe, slices)
        _check(recipe, slices, config)
        model = draw_model(lambda: UniMatrixForCausalLM(config), recipe.seed)
        return cls(name=name, recipe=recipe, slices=slices, model=model, on_test=on_test)

    def measure(self, attempt: Attempt) -> Record:
        """Train, test and save the model; return the record with what ``run_recall`` returns."""
        recipe, slices, model = self.recipe, self.slices, self.model
        train = recipe.to_train_section()
        settings = Recipe(model=ModelSection(preset=recipe.preset), train=train)
        record = start_record(settings, model.config.to_dict(), attempt.device)
        examples = RotatingDataset(
            slices.train,
            recipe.seed,
            recipe.steps * recipe.batch_size,
            recipe.batch_size,
            first=slices.first,
            num_first=round(slices.first_fraction * recipe.steps),
        )
        train_s = attempt.train(model, examples, train, attempt.folder)
        results = _test(model, recipe, slices, self.on_test)
        results |= {"train_s": train_s, "recipe": dataclasses.asdict(recipe)}
        if attempt.folder is not None:
            save_model(model, attempt.folder)
        return record | {"status": "done", "results": results}


def _check(recipe: RecallRecipe, slices: RecallSlices, config: UniMatrixConfig) -> None:
    """Raise ``InputError`` for what would stop the run after its first writing."""
    recipe.to_train_section()
    if recipe.test_examples < 1:
        raise InputError(f"test_examples is {recipe.test_examples}; it must be at least 1")
    for num_slots in recipe.test_slots:
        if num_slots < 0:
            raise InputError(f"test_slots holds {num_slots}; give at least 1, or 0 for the pairs")
    if recipe.test_slots and config.associative_memory != "selective":
        raise InputError(
            f"test_slots is {list(recipe.test_slots)} and the model of {recipe.task} with preset "
            f"{recipe.preset!r} has no selective slots; leave it out"
        )
    if recipe.test_kept and config.associative_memory != "indexed":
        raise InputError(
            f"test_kept is {list(recipe.test_kept)} and preset {recipe.preset!r} has no index of "
            "the text; leave it out"
        )
    for num_tokens in recipe.test_kept:
        require_window("test_kept", num_tokens, config.index_units)
    for task in slices.test.values():
        _list_slots(recipe, task)
    if config.max_position_embeddings is not None:
        longest = max(map(_count_tokens, (*slices.train, *slices.test.values())))
        if longest > config.max_position_embeddings:
            raise InputError(
                f"an example has {longest} tokens and the position table "
                f"{config.max_position_embeddings} rows; choose shorter tests or preset unimatrix"
            )


def _test(
    model: UniMatrixForCausalLM,
    recipe: RecallRecipe,
    slices: RecallSlices,
    on_test: Callable[[str], None],
) -> dict[str, Any]:
    """Return accuracies, what copying alone reaches, and sizes."""
    accuracy = _measure_accuracy(model, recipe, slices, on_test)
    copy_rules = {}
    for name, task in slices.test.items():
        if _count_tokens(task) <= _LONGEST_COPIED_TOKENS:
            num_copied = min(recipe.test_examples, _COPY_RULE_EXAMPLES)
            copy_rules[name] = measure_copy_rules(task, num_copied, recipe.seed + TEST_SEED_OFFSET)
    _resize_slots(model, model.config.num_slots if recipe.test_slots else None)
    by_part = measure_state_bytes(model)
    results = {
        "task": recipe.task,
        "accuracy": accuracy,
        "mean_accuracy": statistics.fmean(accuracy.values()),
        "copy_rules": copy_rules,
        "parameters": model.num_parameters(),
        "state_bytes": sum(by_part.values()),
        "state_bytes_by_part": by_part,
    }
    if recipe.test_kept:
        results["kept"] = _test_kept(model, recipe, slices, on_test)
    return results


def _test_kept(
    model: UniMatrixForCausalLM,
    recipe: RecallRecipe,
    slices: RecallSlices,
    on_test: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Return accuracies and state of the model with each number of tokens that it is to remember.

    The model is left as it was trained.
    """
    trained, kept = model.config.automaton_window, []
    assert trained is not None
    for num_tokens in recipe.test_kept:
        model.set_window(num_tokens)
        on_test(f"{num_tokens} tokens kept")
        accuracy = _measure_accuracy(model, recipe, slices, on_test)
        kept.append(
            {
                "automaton_window": num_tokens,
                "state_bytes": sum(measure_state_bytes(model).values()),
                "accuracy": accuracy,
                "mean_accuracy": statistics.fmean(accuracy.values()),
            }
        )
    model.set_window(trained)
    return kept


def _measure_accuracy(
    model: UniMatrixForCausalLM,
    recipe: RecallRecipe,
    slices: RecallSlices,
    on_test: Callable[[str], None],
) -> dict[str, float]:
    """Return the accuracy on every test, by its name and by the slots, where the recipe has any."""
    accuracy = {}
    for name, task in slices.test.items():
        on_test(name)
        batch_size = max(_TOKENS_PER_BATCH // _count_tokens(task), _FEWEST_PER_BATCH)
        for label, num_slots in _list_slots(recipe, task):
            _resize_slots(model, num_slots)
            accuracy[name + label] = measure_recall(
                model,
                task,
                recipe.test_examples,
                recipe.seed + TEST_SEED_OFFSET,
                batch_size=min(batch_size, _MOST_PER_BATCH),
                whole_answer=slices.whole_answer,
            )
    return accuracy


def _count_tokens(task: SeededTask) -> int:
    """Return the length of every example of a task."""
    return task.build(0, 1)["input_ids"].shape[1]


def _list_slots(recipe: RecallRecipe, task: SeededTask) -> list[tuple[str, int | None]]:
    """Return what follows a test's name, and its number of slots, for each number in the recipe."""
    if not recipe.test_slots:
        return [("", None)]
    numbers = dict.fromkeys(number or count_pairs(task) for number in recipe.test_slots)
    return [(f" in {number} slots", number) for number in numbers]


def _resize_slots(model: UniMatrixForCausalLM, num_slots: int | None) -> None:
    """Give the model so many slots; ``None`` leaves them."""
    if num_slots is None:
        return
    mixer = model.model.block.selective_mixer
    assert mixer is not None
    mixer.num_slots = num_slots
