"""Figures of a long-context evaluation, from its record as ``run_long_context`` returns it."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from unimatrix.evaluation.units import format_bytes
from unimatrix.reports import figures
from unimatrix.reports.long_context_results import select_results
from unimatrix.studies.eval_long.run import BOOK
from unimatrix.tasks.ruler import RULER_TASKS

_PANELS_PER_ROW = 4
_LENGTH_FONT = 10


def plot_tasks(record: Mapping[str, Any]) -> Figure:
    """Draw the score of RULER's tasks, at least one, against length: a panel a task."""
    done = [cell for cell in record["cells"] if cell["status"] == "done"]
    tasks = [task for task in RULER_TASKS if any(cell["task"] == task for cell in done)]
    lengths = sorted({cell["total_bytes"] for cell in record["cells"] if cell["task"] in tasks})
    columns = min(_PANELS_PER_ROW, len(tasks))
    num_rows = math.ceil(len(tasks) / columns)
    figure = figures.start_figure(max(9.0, 1.5 + 4.0 * columns), 1.6 + 3.2 * num_rows)
    grid = figure.subplots(num_rows, columns, squeeze=False, sharex=True, sharey=True)
    panels = list(grid.flat)
    styles = figures.list_styles(record["models"])
    for axes, task in zip(panels, tasks, strict=False):
        for model, style in styles.items():
            points = sorted(
                (cell["total_bytes"], 100 * cell["results"]["score"])
                for cell in done
                if (cell["task"], cell["model"]) == (task, model)
            )
            if points:
                axes.plot(*zip(*points, strict=True), label=figures.wrap_label(model), **style)
        axes.set_title(task, loc="left", fontsize=15, color=figures.INK)
        # A tick at each length that was measured, and none between them.
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [format_bytes(length) for length in lengths])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlim(lengths[0] / 1.5, lengths[-1] * 1.5)
        axes.set_ylim(-4, 104)
        figures.set_look(axes)
        axes.tick_params(axis="x", labelbottom=True, labelsize=_LENGTH_FONT)
    for axes in panels[len(tasks) :]:
        axes.set_visible(False)
    figure.supylabel("score of 100", fontsize=15, color=figures.INK)
    figure.supxlabel("bytes of prompt and answer", fontsize=15, color=figures.INK)
    figures.set_figure_title(
        figure, f"RULER over bytes, {record['plan']['num_examples']} examples a point"
    )
    figures.add_legend(figure, panels, fontsize=13)
    return figure


def plot_positions(record: Mapping[str, Any]) -> Figure:
    """Draw bits per byte of the book, which was read, against position: a line a model."""
    figure = figures.start_figure(12.0, 6.6)
    axes = figure.add_subplot()
    styles = figures.list_styles(record["models"])
    for model, results in select_results(record, BOOK).items():
        _, ends, bits = zip(*results["by_position"], strict=True)
        axes.plot(ends, bits, label=figures.wrap_label(model), **styles[model])
    figures.set_byte_axis(axes)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("bytes read before (ends of bins that double)")
    axes.set_ylabel("bits per byte in the bin")
    figures.set_look(axes)
    name = ", ".join(Path(source).name for source in record["plan"]["data"])
    figures.set_figure_title(figure, f"Bits per byte by position, {name}")
    figures.add_legend(figure, [axes], fontsize=13)
    return figure
