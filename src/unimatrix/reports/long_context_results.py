"""Tables of a long-context evaluation, from its record as ``run_long_context`` returns it."""

from collections.abc import Mapping
from typing import Any

from unimatrix.evaluation.units import format_bytes
from unimatrix.reports.text import Table, tabulate
from unimatrix.studies.eval_long.run import BOOK, CODE
from unimatrix.tasks.ruler import RULER_TASKS

Record = Mapping[str, Any]
NOT_RUN = "-"
"""What stands for the score of a cell that was not run."""
_NAMED_TASKS = 3


def tabulate_tasks(record: Record) -> Table:
    """Return the scores of RULER's tasks times 100, a row a task and model, a column a length.

    The mean comes last and stands only where every task that fits the length was run.
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
            row = [cells.get((task, model, length)) for length in lengths]
            rows.append([task, model, *map(_format_score, row)])
    for model in models if len(tasks) > 1 else []:
        columns = ([cells.get((task, model, length)) for task in tasks] for length in lengths)
        rows.append(["mean", model, *map(_format_mean, columns)])
    return Table(["task", "model", *map(format_bytes, lengths)], rows)


def tabulate_answered(record: Record) -> Table:
    """Return the scores of RULER's tasks; those that no model answered share rows."""
    header, rows = tabulate_tasks(record)
    by_task: dict[str, list[list[str]]] = {}
    for row in rows:
        by_task.setdefault(row[0], []).append(row[2:])
    unanswered: dict[tuple[str, ...], list[str]] = {}
    for task, scores in by_task.items():
        columns = [set(column) - {"", NOT_RUN} for column in zip(*scores, strict=True)]
        if task != "mean" and any(columns) and all(column <= {"0.0"} for column in columns):
            pattern = tuple("0.0" if column else NOT_RUN for column in columns)
            unanswered.setdefault(pattern, []).append(task)
    hidden = {task for tasks in unanswered.values() for task in tasks}
    shared = [
        [", ".join(tasks), "all that can read it", *pattern]
        for pattern, tasks in unanswered.items()
    ]
    return Table(header, [*shared, *(row for row in rows if row[0] not in hidden)])


def tabulate_positions(record: Record) -> Table:
    """Return bits per byte of the text by position, a column a model."""
    results = select_results(record, BOOK)
    by_model = {
        model: {first: bits for first, _, bits in result["by_position"]}
        for model, result in results.items()
    }
    rows = [
        {"bytes before": f"{first:,} and more" if first else "fewer than 128"}
        | {model: f"{bins[first]:.3f}" for model, bins in by_model.items() if first in bins}
        for first in sorted({int(first) for bins in by_model.values() for first in bins})
    ]
    if results:
        bits = {model: f"{result['bits_per_byte']:.3f}" for model, result in results.items()}
        read = {model: f"{result['bytes']:,}" for model, result in results.items()}
        context = {model: result["context"] for model, result in results.items()}
        rows += [{"bytes before": "all"} | bits, {"bytes before": "bytes"} | read]
        rows.append({"bytes before": "each sees"} | context)
    return tabulate(rows).select(["bytes before", *results])


def tabulate_code(record: Record) -> Table:
    """Return code completion, a row a model."""
    return tabulate(
        {
            "model": model,
            "next line": f"{100 * lines['exact_match']:.1f}",
            "lines": f"{lines['examples']:,}",
            "bytes above": f"{lines['context_bytes']:,}",
            "far names": _format_accuracy(names["accuracy"]),
            "names": f"{names['examples']:,}",
            "from byte 4": _format_accuracy(names["rest_accuracy"]),
            "such names": f"{names['rest_examples']:,}",
            "each byte sees": names["context"],
        }
        for model, result in select_results(record, CODE).items()
        for lines, names in [(result["lines"], result["names"])]
    )


def tabulate_models(record: Record) -> Table:
    """Return what the models are, a row each."""
    return tabulate(
        {
            "model": label,
            "given as": model["name"],
            "type": model["type"],
            "parameters": f"{model['parameters']:,}",
            "reads": model["reads"],
            "most tokens": "any" if model["limit_tokens"] is None else f"{model['limit_tokens']:,}",
        }
        for label, model in record["models"].items()
    )


def list_reasons(record: Record) -> list[str]:
    """Return why cells were not run, those with the same reason in one sentence."""
    groups: dict[str, list[Record]] = {}
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


def select_results(record: Record, task: str) -> dict[str, dict[str, Any]]:
    """Return the results of a task by model, at the greatest length that was run."""
    cells = [cell for cell in record["cells"] if (cell["task"], cell["status"]) == (task, "done")]
    cells.sort(key=lambda cell: int(cell["total_bytes"]))
    by_model = {cell["model"]: cell["results"] for cell in cells}
    return {model: by_model[model] for model in record["models"] if model in by_model}


def _format_score(cell: Record | None) -> str:
    if cell is None:
        return ""
    return NOT_RUN if cell["status"] != "done" else f"{100 * cell['results']['score']:.1f}"


def _format_mean(cells: list[Record | None]) -> str:
    """Return the mean of the cells that were run, and of how many where some were not."""
    scores = [cell["results"]["score"] for cell in cells if cell and cell["status"] == "done"]
    if not scores:
        return NOT_RUN
    mean = f"{100 * sum(scores) / len(scores):.1f}"
    return mean if len(scores) == len(cells) else f"{mean} of {len(scores)}"


def _format_accuracy(fraction: float | None) -> str:
    return NOT_RUN if fraction is None else f"{100 * fraction:.1f}"
