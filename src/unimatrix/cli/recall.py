"""``unimatrix recall``: the recall lab."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from unimatrix.cli.common import (
    DeviceOption,
    JsonOption,
    SeedOption,
    emit,
    make_log,
    parse_overrides,
    pick_device,
)
from unimatrix.studies.recall.recipe import TASKS, RecallRecipe, find_recall_recipe
from unimatrix.train.field_types import read_field_docs

_DOCS = read_field_docs(RecallRecipe)


def _option(flag: str, field: str, **settings: Any) -> Any:
    """Return the option of a field of the recipe, with the field's docstring as its help."""
    return typer.Option(flag, help=_DOCS[field], **settings)


def run(
    task: Annotated[
        str, typer.Argument(metavar="TASK", help=f"The task: {', '.join(TASKS)}.")
    ] = TASKS[0],
    *,
    preset: Annotated[
        str | None,
        typer.Option("--preset", help="Preset to train; a published one as the paper trains it."),
    ] = None,
    dropout: Annotated[float | None, _option("--dropout", "dropout")] = None,
    num_slots: Annotated[int | None, _option("--slots", "num_slots")] = None,
    num_pairs: Annotated[int | None, _option("--pairs", "num_pairs")] = None,
    steps: Annotated[int | None, _option("--steps", "steps")] = None,
    batch_size: Annotated[int | None, _option("--batch-size", "batch_size")] = None,
    learning_rate: Annotated[float | None, _option("--lr", "learning_rate")] = None,
    weight_decay: Annotated[float | None, _option("--weight-decay", "weight_decay")] = None,
    test_examples: Annotated[int | None, _option("--test-examples", "test_examples")] = None,
    test_tokens: Annotated[int | None, _option("--test-tokens", "test_tokens")] = None,
    test_pairs: Annotated[
        list[int] | None, _option("--test-pairs", "test_pairs", show_default=False)
    ] = None,
    test_slots: Annotated[
        list[int] | None, _option("--test-slots", "test_slots", show_default=False)
    ] = None,
    data: Annotated[list[str] | None, _option("--data", "data")] = None,
    test_data: Annotated[list[str] | None, _option("--test-data", "test_data")] = None,
    test_windows: Annotated[
        list[int] | None, _option("--test-window", "test_windows", show_default=False)
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="FIELD=VALUE",
            help="Change another field of the model's configuration, such as write_gate=false. "
            "Repeatable.",
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer steps and examples: two minutes on two cores.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder to keep model, log and record in.")
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            "--report", help="HTML file to write the report to; its plot goes beside as PNG."
        ),
    ] = None,
    seed: SeedOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Train a small model on a recall task and test it, beside what copying alone reaches.

    Options left out are those of the task's recipe. A published preset is trained on associative
    recall with the paper's recipe. Accuracy is a fraction in --json.
    """
    # The parameters bear the names of the recipe's fields.
    options = {name: value for name, value in locals().items() if name in _DOCS}
    recipe = find_recall_recipe(task, preset, quick=quick)
    changes: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in options.items()
        if value not in (None, [])
    }
    overrides = recipe.overrides | parse_overrides(assignments or [])
    recipe = replace(recipe, **changes, overrides=overrides)
    if report is not None:
        from unimatrix.reports.page import require_report_path
        from unimatrix.reports.recall_report import write_recall_report

        require_report_path(report)
    result = _run_visibly(recipe, out, pick_device(device))
    if report is not None:
        write_recall_report([result], report)
    emit(result, as_json, _render)


def _run_visibly(recipe: RecallRecipe, out: Path | None, device: str) -> dict[str, Any]:
    """Run the experiment with a progress bar."""
    from unimatrix.cli.progress import TrainingProgress
    from unimatrix.studies.recall.run import run_recall

    log = make_log()
    progress = TrainingProgress(log, loss_scale=1.0, loss_unit="nats")

    def show_test(name: str) -> None:
        progress.close()
        log.print(f"testing {name}", highlight=False)

    try:
        return run_recall(
            recipe,
            out=out,
            device=device,
            callbacks=[progress],
            on_metrics=progress.show_metrics,
            on_test=show_test,
        )
    finally:
        progress.close()


def _render(result: dict[str, Any]) -> str:
    """Return the accuracies for people, per cent."""
    from unimatrix.reports.recall_results import find_copy_rules

    recipe = result["recipe"]
    width = max(10, *(len(name) for name in result["accuracy"]))
    lines = [
        f"{result['task']} recall: {recipe['preset']}, {recipe['steps']:,} steps of "
        f"{recipe['batch_size']}, dropout {recipe['dropout']:g}, seed {recipe['seed']}",
        "",
        f"{'test':<{width}}  accuracy   copy after last  first match  suffix automaton",
    ]
    for name, accuracy in result["accuracy"].items():
        copied = "".join(f"{100 * x:>15.1f}" for x in find_copy_rules(result, name).values())
        lines.append(f"{name:<{width}}  {100 * accuracy:>8.2f} {copied}")
    lines += [
        "",
        f"per cent of {recipe['test_examples']:,} examples a test; the last three columns copy "
        "without learning",
        f"{result['parameters']:,} parameters, {result['state_bytes']:,} state bytes, trained in "
        f"{result['train_s']:.1f} s",
    ]
    return "\n".join(lines)
