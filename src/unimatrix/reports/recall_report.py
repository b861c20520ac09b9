"""Recall runs as one HTML file that needs nothing but itself, and its main plot as PNG."""

import html
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unimatrix.reports.page import Page, render_note, render_table
from unimatrix.reports.recall_results import (
    INFORMATION_LIMIT_BYTES,
    PUBLISHED_MQAR_B,
    PUBLISHED_SOURCE,
    Configuration,
    average_copy_rule,
    format_fraction,
    group_results,
    list_copy_rules,
    name_rule,
)

# The task whose state and accuracy others have published.
_MAIN_TASK = "mqar-b"
_TITLES = {
    "associative": "Associative recall",
    "mqar-a": "Multi-query recall, grid A",
    "mqar-b": "Multi-query recall, grid B",
    "mqar-forgetting": "Multi-query recall with keys bound again",
    "mqar-compositional": "Multi-query recall with two-token keys",
    "mqar-chained": "Multi-query recall through a chain of two bindings",
    "noisy-keys": "Recall by a key with one wrong letter",
    "needle": "A needle in book text",
    "triple": "Triple interaction",
}
_SLICE_LABELS = {
    "associative": "bindings in an example",
    "needle": "length of the text in bytes",
    "triple": "rule",
}
_SHAPE_LABEL = "tokens x bindings of an example"
_LEDE = (
    "Each example states bindings of keys to values and asks for them later. The tables give the "
    "share of values that the trained model returns, beside three rules that copy from the input "
    "and have no parameters."
)
_COPY_NOTE = (
    "Copy rules answer with the token that followed the same key earlier in the input. Where a "
    "copy rule does as well as the model (shaded), the figure is no evidence that anything was "
    "learned beyond copying."
)
_NEEDLE_NOTE = (
    "Here an example counts for the model only when the whole answer is right, and for the copy "
    "rules by the share of its labels."
)


def write_recall_report(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write recall runs as a self-contained HTML file and its main plot as PNG beside it.

    Args:
        results: the JSON of recall runs of any tasks, as ``run_recall`` returns it; runs that
            differ in nothing but their seed are averaged.
        path: of the HTML file; the PNG has the same stem. Missing folders are made.

    Raises:
        InputError: if there is no result, one lacks a field, or the path cannot be written.
    """
    from unimatrix.reports.recall_plots import plot_slices, plot_state_against_accuracy

    runs = "1 run" if len(results) == 1 else f"{len(results)} runs"
    lede = f"{_LEDE} From {runs}."
    page = Page(path, "Exact recall in constant state", lede, window_title="Exact recall")
    tasks = group_results(results)
    main_task = _MAIN_TASK if _MAIN_TASK in tasks else next(iter(tasks))
    # The main task leads, and its plot is a file of its own; the others keep their order.
    for task in sorted(tasks, key=lambda task: task != main_task):
        configurations, title = tasks[task], html.escape(_TITLES.get(task, task))
        figure = (
            plot_state_against_accuracy(configurations)
            if task == _MAIN_TASK
            else plot_slices(configurations, _SLICE_LABELS.get(task, _SHAPE_LABEL))
        )
        page.add("<section>", f"<h2>{title} <code>{html.escape(task)}</code></h2>")
        page.add_picture("" if task == main_task else None, figure, f"Plot of {title}")
        if task == _MAIN_TASK:
            page.add(_render_published())
        page.add(*(_render_configuration(task, configuration) for configuration in configurations))
        note = f"{_COPY_NOTE} {_NEEDLE_NOTE}" if task == "needle" else _COPY_NOTE
        page.add(render_note(note), "</section>")
    page.write()


def _render_configuration(task: str, configuration: Configuration) -> str:
    run, num_runs = configuration.runs[0], len(configuration.runs)
    seeds = (str(run["recipe"].get("seed", "not stated")) for run in configuration.runs)
    seconds = [float(run["train_s"]) for run in configuration.runs]
    spread = f" ({min(seconds):.1f} to {max(seconds):.1f})" if num_runs > 1 else ""
    facts = [
        ["parameters", f"{run['parameters']:,}"],
        ["state", f"{configuration.state_bytes:,} bytes"],
        ["training", f"{statistics.mean(seconds):.1f} s{spread}"],
        ["seed" if num_runs == 1 else "seeds", ", ".join(seeds)],
    ]
    by_part = {part.replace("_", " "): n for part, n in run["state_bytes_by_part"].items()}
    by_part["all"] = configuration.state_bytes
    parts = [[part, f"{num_bytes:,}"] for part, num_bytes in by_part.items()]
    settings = ", ".join(f"{k}={value}" for k, value in run["recipe"].items() if k != "seed")
    return "\n".join(
        [
            f"<h3>{html.escape(configuration.name)}</h3>",
            _render_accuracies(task, configuration),
            '<div class="tables">',
            render_table(["run", ""], facts),
            render_table(["state by part", "bytes"], parts, last_is_total=True),
            "</div>",
            f"<details><summary>Recipe</summary><code>{html.escape(settings)}</code></details>",
        ]
    )


def _render_accuracies(task: str, configuration: Configuration) -> str:
    """Return the table of slices: our mean and worst run, then every copy rule."""
    rules = list_copy_rules([configuration])
    header = [_SLICE_LABELS.get(task, _SHAPE_LABEL), "ours, mean", "ours, worst run"]
    slices = configuration.slices
    lines = [(name, [name], configuration.accuracies(name)) for name in slices]
    lines.append((f"mean of {len(slices)}", slices, configuration.mean_accuracies))
    rows, classes = [], []
    for name, averaged, ours in lines:
        mean = statistics.mean(ours)
        copied = [average_copy_rule([configuration], rule, averaged) for rule in rules]
        cells = ["not measured" if value is None else format_fraction(value) for value in copied]
        rows.append([name, format_fraction(mean), format_fraction(min(ours)), *cells])
        wins = ["wins" if value is not None and value >= mean else "" for value in copied]
        classes.append(["", "ours", "", *wins])
    header += map(name_rule, rules)
    return render_table(header, rows, classes=classes, last_is_total=True)


def _render_published() -> str:
    """Return the published points as a table that stays closed until asked for."""
    rows = [
        [model, ", ".join(f"{accuracy:g} at {size:g} KiB" for size, accuracy in points)]
        for model, points in PUBLISHED_MQAR_B.items()
    ]
    return (
        '<p class="note">Lines with small markers are published accuracies: '
        f"{html.escape(PUBLISHED_SOURCE)}. Their state is that at 1,024 tokens, ours is all that "
        "is carried from one token to the next, at batch 1. The two later points of RWKV-7 stand "
        "at their true state, which the published plot counts 4 and 16 times. The dotted line at "
        f"{INFORMATION_LIMIT_BYTES} bytes is what a list of 256 pairs of a 12-bit key and a 12-bit "
        "value takes; dashed lines are the copy rules.</p>\n"
        "<details><summary>Published points</summary>"
        f"{render_table(['model', 'accuracy and state'], rows)}</details>"
    )
