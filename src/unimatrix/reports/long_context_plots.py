"""Figures of a long-context evaluation."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from unimatrix.evaluation.units import format_bytes
from unimatrix.reports.compare_plots import list_styles
from unimatrix.reports.figures import INK, set_look, wrap_label
from unimatrix.studies.eval_long.run import BOOK
from unimatrix.tasks.ruler import RULER_TASKS

Record = Mapping[str, Any]
_PANELS_PER_ROW = 4
_LENGTH_FONT = 10


def plot_tasks(record: Record) -> Figure:
    """Draw the score of every task against length, a panel a task, a line a model.

    Args:
        record: as ``run_long_context`` returns it, with a cell of RULER's tasks that was run.
    """
    done = [cell for cell in record["cells"] if cell["status"] == "done"]
    tasks = [task for task in RULER_TASKS if any(cell["task"] == task for cell in done)]
    lengths = sorted({cell["total_bytes"] for cell in record["cells"] if cell["task"] in tasks})
    columns = min(_PANELS_PER_ROW, len(tasks))
    num_rows = math.ceil(len(tasks) / columns)
    size = (max(9.0, 1.5 + 4.0 * columns), 1.6 + 3.2 * num_rows)
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    grid = figure.subplots(num_rows, columns, squeeze=False, sharex=True, sharey=True)
    panels = [axes for row in grid for axes in row]
    styles = list_styles(record["models"])
    for axes, task in zip(panels, tasks, strict=False):
        for model, style in styles.items():
            points = sorted(
                (cell["total_bytes"], 100 * cell["results"]["score"])
                for cell in done
                if (cell["task"], cell["model"]) == (task, model)
            )
            if points:
                axes.plot(*zip(*points, strict=True), label=wrap_label(model), **style)
        axes.set_title(task, loc="left", fontsize=15, color=INK)
        _set_lengths(axes, lengths)
        axes.set_ylim(-4, 104)
        _finish(axes)
        axes.tick_params(axis="x", labelbottom=True, labelsize=_LENGTH_FONT)
    for axes in panels[len(tasks) :]:
        axes.set_visible(False)
    figure.supylabel("score of 100", fontsize=15, color=INK)
    figure.supxlabel("bytes of prompt and answer", fontsize=15, color=INK)
    _add_title(figure, f"RULER over bytes, {record['plan']['num_examples']} examples a point")
    _add_legend(figure, panels)
    return figure


def plot_positions(record: Record) -> Figure:
    """Draw bits per byte of the text against position, a line a model.

    Args:
        record: as ``run_long_context`` returns it, with a book that was read.
    """
    figure = Figure(figsize=(12.0, 6.6), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    for model, style in list_styles(record["models"]).items():
        for cell in record["cells"]:
            is_asked = (cell["task"], cell["model"], cell["status"]) == (BOOK, model, "done")
            if is_asked and cell["total_bytes"] == _find_longest(record, model):
                _, ends, bits = zip(*cell["results"]["by_position"], strict=True)
                axes.plot(ends, bits, label=wrap_label(model), **style)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_bytes(value)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("bytes read before (ends of bins that double)")
    axes.set_ylabel("bits per byte in the bin")
    _finish(axes)
    names = [Path(source).name for source in record["plan"]["data"]]
    name = ", ".join(names).replace("$", r"\$")
    _add_title(figure, f"Bits per byte by position, {name}")
    _add_legend(figure, [axes])
    return figure


def _find_longest(record: Record, model: str) -> int:
    """Return the greatest length at which a model read the book."""
    return max(
        int(cell["total_bytes"])
        for cell in record["cells"]
        if (cell["task"], cell["model"], cell["status"]) == (BOOK, model, "done")
    )


def _set_lengths(axes: Axes, lengths: Sequence[int]) -> None:
    """Mark the lengths measured, and nothing between them."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [format_bytes(length) for length in lengths])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(lengths[0] / 1.5, lengths[-1] * 1.5)


def _finish(axes: Axes) -> None:
    axes.grid(color="#e6e6e6", linewidth=0.9)
    set_look(axes)


def _add_title(figure: Figure, text: str) -> None:
    figure.suptitle(text, x=0.01, ha="left", fontsize=20, color=INK)


def _add_legend(figure: Figure, panels: Sequence[Axes]) -> None:
    """Draw one legend to the right, each label once."""
    handles: dict[str, Any] = {}
    for axes in panels:
        handles |= {
            label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside right upper",
        frameon=False,
        fontsize=13,
        labelcolor=INK,
    )
