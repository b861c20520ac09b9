"""``unimatrix recall``: the paper's associative-recall experiment."""

from pathlib import Path
from typing import Annotated, Any

import typer

from unimatrix.cli.common import DeviceOption, JsonOption, SeedOption, emit, make_log, pick_device
from unimatrix.errors import InputError, suggest
from unimatrix.field_types import read_field_docs
from unimatrix.recall_recipe import RecallRecipe
from unimatrix.recipe import Recipe, override

TASKS = ("associative",)

_PAPER = RecallRecipe()
_DOCS = read_field_docs(RecallRecipe)


TaskArgument = Annotated[str, typer.Argument(metavar="TASK", help=f"The task: {', '.join(TASKS)}.")]
PresetOption = Annotated[str, typer.Option("--preset", help=_DOCS["preset"])]
DropoutOption = Annotated[float, typer.Option("--dropout", help=_DOCS["dropout"])]
SlotsOption = Annotated[int | None, typer.Option("--slots", help=_DOCS["num_slots"])]
PairsOption = Annotated[int, typer.Option("--pairs", help=_DOCS["num_pairs"])]
StepsOption = Annotated[int, typer.Option("--steps", help=_DOCS["steps"])]
BatchSizeOption = Annotated[int, typer.Option("--batch-size", help=_DOCS["batch_size"])]
LearningRateOption = Annotated[float, typer.Option("--lr", help=_DOCS["learning_rate"])]
WeightDecayOption = Annotated[float, typer.Option("--weight-decay", help=_DOCS["weight_decay"])]
TestExamplesOption = Annotated[int, typer.Option("--test-examples", help=_DOCS["test_examples"])]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="FIELD=VALUE",
        help="Change another field of the model's configuration, such as write_gate=false. "
        "Repeatable.",
    ),
]
OutOption = Annotated[
    Path | None, typer.Option("--out", help="Folder to keep model, log and record in.")
]


def run(
    task: TaskArgument = TASKS[0],
    *,
    preset: PresetOption = _PAPER.preset,
    dropout: DropoutOption = _PAPER.dropout,
    slots: SlotsOption = None,
    pairs: PairsOption = _PAPER.num_pairs,
    steps: StepsOption = _PAPER.steps,
    batch_size: BatchSizeOption = _PAPER.batch_size,
    learning_rate: LearningRateOption = _PAPER.learning_rate,
    weight_decay: WeightDecayOption = _PAPER.weight_decay,
    test_examples: TestExamplesOption = _PAPER.test_examples,
    assignments: SetOption = None,
    out: OutOption = None,
    seed: SeedOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Train on associative recall as the paper does, and test it on 4, 6 and 8 pairs.

    An example binds values to keys and then asks for one of them; a guess among the values is right
    once in 8. The defaults are the paper's, seed 19 included; accuracy is a fraction in --json.
    """
    _require_task(task)
    recipe = RecallRecipe(
        preset=preset,
        dropout=dropout,
        num_slots=slots,
        overrides=_parse_overrides(assignments or []),
        num_pairs=pairs,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        test_examples=test_examples,
        seed=_PAPER.seed if seed is None else seed,
    )
    emit(_run_visibly(recipe, out, pick_device(device)), as_json, _render)


def _require_task(task: str) -> None:
    if task not in TASKS:
        raise InputError(
            f"unknown task {task!r}; choose one of {', '.join(TASKS)}.{suggest(task, TASKS)}"
        )


def _parse_overrides(assignments: list[str]) -> dict[str, Any]:
    """Return configuration fields by name, of the types that the configuration declares.

    Raises:
        InputError: for an assignment without ``=``, an unknown field or an unusable value.
    """
    for assignment in assignments:
        name, equals, _ = assignment.partition("=")
        if not equals:
            raise InputError(f"{assignment!r} sets nothing; write FIELD=VALUE")
        if name.strip() in ("preset", "init"):
            raise InputError(f"--set {assignment} is no field of the configuration; use --preset")
    return override(Recipe(), [f"model.{assignment}" for assignment in assignments]).model.overrides


def _run_visibly(recipe: RecallRecipe, out: Path | None, device: str) -> dict[str, Any]:
    """Run the experiment with a progress bar."""
    from unimatrix.cli.progress import TrainingProgress
    from unimatrix.recall_run import run_recall

    progress = TrainingProgress(make_log(), loss_scale=1.0, loss_unit="nats")
    try:
        return run_recall(
            recipe,
            out=out,
            device=device,
            callbacks=[progress],
            on_metrics=progress.show_metrics,
        )
    finally:
        progress.close()


def _render(result: dict[str, Any]) -> str:
    """Return the accuracies for people."""
    recipe = result["recipe"]
    lines = [
        f"{recipe['task']} recall: {recipe['preset']}, {recipe['steps']:,} steps of "
        f"{recipe['batch_size']}, dropout {recipe['dropout']:g}, seed {recipe['seed']}",
        "",
        "pairs  accuracy",
    ]
    for pairs, accuracy in result["accuracy"].items():
        trained = "   (trained on)" if int(pairs) == recipe["num_pairs"] else ""
        lines.append(f"{pairs:>5}  {accuracy:>7.1%}{trained}".replace("%", " %"))
    return "\n".join(
        [
            *lines,
            "",
            f"{recipe['test_examples']:,} examples a test; chance is 12.5 %",
            f"{result['parameters']:,} parameters, {result['state_bytes']:,} state bytes, trained "
            f"in {result['train_s']:.1f} s",
        ]
    )
