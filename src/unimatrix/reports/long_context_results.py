"""Rows of the tables of a long-context evaluation, from its record."""

from collections.abc import Mapping
from typing import Any

from unimatrix.evaluation.units import format_bytes
from unimatrix.reports.compare_results import Table
from unimatrix.studies.eval_long.run import BOOK, CODE
from unimatrix.tasks.ruler import RULER_TASKS

Record = Mapping[str, Any]
NOT_RUN = "-"
"""What stands for the score of a cell that was not run."""
_NAMED_TASKS = 3


def tabulate_tasks(record: Record) -> Table:
    """Return the scores of RULER's tasks times 100, a row a task and model, a column a length.

    The mean comes last and stands only where every task that fits the length was run.

    Args:
        record: as ``run_long_context`` returns it.
    """
    cells = {
        (cell["task"], cell["model"], cell["total_bytes"]): cell
        for cell in record["cells"]
        if cell["task"] in RULER_TASKS
    }
    lengths = sorted({key[2] for key in cells})
    tasks = [task for task in RULER_TASKS if any(key[0] == task for key in cells)]
    models = [model for model in record["models"] if any(key[1] == model for key in cells)]
    rows = []
    for task in tasks:
        for model in models:
            found = [cells.get((task, model, length)) for length in lengths]
            rows.append([task, model, *map(_write_score, found)])
    for model in models if len(tasks) > 1 else []:
        means = [
            _write_mean([cells.get((task, model, length)) for task in tasks]) for length in lengths
        ]
        rows.append(["mean", model, *means])
    return Table(["task", "model", *map(format_bytes, lengths)], rows)


def tabulate_positions(record: Record) -> Table:
    """Return bits per byte of the text by position, a column a model.

    Args:
        record: as ``run_long_context`` returns it.
    """
    results = _select(record, BOOK)
    if not results:
        return Table(["bytes before"], [])
    by_model = {
        model: {first: bits for first, _, bits in result["by_position"]}
        for model, result in results.items()
    }
    firsts = sorted({int(first) for bins in by_model.values() for first in bins})
    rows = [
        [
            f"{first:,} and more" if first else "fewer than 128",
            *(_write_bits(bins.get(first)) for bins in by_model.values()),
        ]
        for first in firsts
    ]
    rows.append(["all", *(_write_bits(result["bits_per_byte"]) for result in results.values())])
    rows.append(["bytes", *(f"{result['bytes']:,}" for result in results.values())])
    rows.append(["each sees", *(result["context"] for result in results.values())])
    return Table(["bytes before", *results], rows)


def tabulate_code(record: Record) -> Table:
    """Return code completion, a row a model.

    Args:
        record: as ``run_long_context`` returns it.
    """
    rows = []
    for model, result in _select(record, CODE).items():
        lines, names = result["lines"], result["names"]
        rows.append(
            [
                model,
                f"{100 * lines['exact_match']:.1f}",
                f"{lines['examples']:,}",
                f"{lines['context_bytes']:,}",
                _write_percent(names["accuracy"]),
                f"{names['examples']:,}",
                _write_percent(names["rest_accuracy"]),
                f"{names['rest_examples']:,}",
                names["context"],
            ]
        )
    header = ["model", "next line", "lines", "bytes above", "far names", "names"]
    return Table([*header, "from byte 4", "such names", "each byte sees"], rows)


def tabulate_models(record: Record) -> Table:
    """Return what the models are, a row each.

    Args:
        record: as ``run_long_context`` returns it.
    """
    rows = [
        [
            label,
            model["name"],
            model["type"],
            f"{model['parameters']:,}",
            model["reads"],
            "any" if model["limit_tokens"] is None else f"{model['limit_tokens']:,}",
        ]
        for label, model in record["models"].items()
    ]
    return Table(["model", "given as", "type", "parameters", "reads", "most tokens"], rows)


def list_reasons(record: Record) -> list[str]:
    """Return why cells were not run, those with the same reason in one sentence.

    Args:
        record: as ``run_long_context`` returns it.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for cell in record["cells"]:
        if cell["status"] != "done":
            groups.setdefault(cell["reason"], []).append(cell)
    sentences = []
    for reason, cells in groups.items():
        models, tasks, lengths = (
            list(dict.fromkeys(cell[name] for cell in cells))
            for name in ("model", "task", "total_bytes")
        )
        who = "every model" if len(models) == len(record["models"]) > 1 else ", ".join(models)
        what = ", ".join(tasks) if len(tasks) <= _NAMED_TASKS else f"{len(tasks)} tasks"
        where = ", ".join(map(format_bytes, lengths))
        sentences.append(f"{who}, {what} at {where}: {reason}")
    return sentences


def _select(record: Record, task: str) -> dict[str, dict[str, Any]]:
    """Return the results of a task by model, at the greatest length run."""
    found = sorted(
        (cell for cell in record["cells"] if cell["task"] == task and cell["status"] == "done"),
        key=lambda cell: int(cell["total_bytes"]),
    )
    by_model = {cell["model"]: cell["results"] for cell in found}
    return {model: by_model[model] for model in record["models"] if model in by_model}


def _write_score(cell: Mapping[str, Any] | None) -> str:
    if cell is None:
        return ""
    return NOT_RUN if cell["status"] != "done" else f"{100 * cell['results']['score']:.1f}"


def _write_mean(cells: list[Mapping[str, Any] | None]) -> str:
    """Return the mean of the cells that were run, and of how many where some were not."""
    scores = [cell["results"]["score"] for cell in cells if cell and cell["status"] == "done"]
    if not scores:
        return NOT_RUN
    mean = f"{100 * sum(scores) / len(scores):.1f}"
    return mean if len(scores) == len(cells) else f"{mean} of {len(scores)}"


def _write_bits(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _write_percent(fraction: float | None) -> str:
    return NOT_RUN if fraction is None else f"{100 * fraction:.1f}"
