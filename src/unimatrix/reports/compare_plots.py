"""Figures of a comparison."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from unimatrix.reports import figures
from unimatrix.reports.compare_results import select_text_cells
from unimatrix.studies.records import Record, Records, select_records

Styles = Mapping[str, Mapping[str, Any]]
"""From ``list_styles``."""

_SIZE = (12.8, 7.2)
_DASHES = ((6.0, 3.0), (3.0, 3.0), (1.5, 2.5))
_CHANCE = 1 / 8
_SMOOTHED_POINTS = 5


def plot_training(records: Records, corpus: str, styles: Styles) -> Figure:
    """Draw bits per byte of the training windows against seconds and against tokens."""
    figure = figures.start_figure(14.0, 6.4)
    panels = figure.subplots(1, 2, sharey=True)
    labels = {"time": "seconds of training", "parameters": "tokens of training"}
    for axes, (table, label) in zip(panels, labels.items(), strict=True):
        # A comparison may have one of the two tables alone.
        for model, cell in _choose_cells(records, corpus, table).items():
            last = cell["train_s"] if table == "time" else cell["tokens"]
            steps = [step * last / cell["num_optim_steps"] for step, _ in cell["loss_curve"]]
            bits = _smooth([nats / math.log(2) for _, nats in cell["loss_curve"]])
            axes.plot(
                steps, bits, label=figures.wrap_label(model), **{**styles[model], "marker": ""}
            )
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(label)
        figures.set_look(axes)
    panels[0].set_ylabel("bits per byte of training windows")
    figures.set_title(panels[0], f"Learning curves, {corpus}")
    figures.add_legend(figure, panels)
    return figure


def plot_positions(records: Records, corpus: str, styles: Styles) -> Figure:
    """Draw bits per byte against the position in the validation text; as in ``plot_training``."""
    figure = figures.start_figure(*_SIZE)
    axes = figure.add_subplot()
    for model, cell in _choose_cells(records, corpus).items():
        ends, bits = zip(*cell["results"]["by_position"], strict=True)
        axes.plot(ends, bits, label=figures.wrap_label(model), **styles[model])
    figures.set_byte_axis(axes)
    axes.set_xlabel("bytes read before (ends of bins that double)")
    axes.set_ylabel("bits per byte in the bin")
    _draw_compressors(axes, records, corpus)
    return _finish(figure, axes, f"Does it use what it read long ago? {corpus}")


def plot_state(records: Records, corpus: str, styles: Styles) -> Figure:
    """Draw validation bits per byte against the bytes carried after the longest reading.

    As in ``plot_training``.
    """
    figure = figures.start_figure(*_SIZE)
    axes = figure.add_subplot()
    longest = 0
    for model, cell in _choose_cells(records, corpus).items():
        results, style = cell["results"], dict(styles[model])
        sizes = {int(length): count for length, count in results["state_bytes"].items()}
        longest = max(sizes)
        bits = results["valid_bits_per_byte"]
        axes.plot([min(sizes.values()), sizes[longest]], [bits, bits], alpha=0.35, **style)
        style["linestyle"] = "none"
        axes.plot([sizes[longest]], [bits], label=figures.wrap_label(model), **style)
    figures.set_byte_axis(axes)
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(f"bytes carried after {longest:,} tokens (pale: after 1,024)")
    axes.set_ylabel("bits per byte, validation")
    _draw_compressors(axes, records, corpus)
    return _finish(figure, axes, f"Prediction against the state that it needs, {corpus}")


def plot_recall(records: Records, styles: Styles) -> Figure:
    """Draw the accuracy of associative recall against the length; as in ``plot_training``."""
    figure = figures.start_figure(*_SIZE)
    axes = figure.add_subplot()
    for model, cell in select_records(records, "recall/").items():
        if cell["status"] == "done":
            by_length = cell["results"]["accuracy_by_tokens"]
            lengths = [int(length) for length in by_length]
            axes.plot(
                lengths, list(by_length.values()), label=figures.wrap_label(model), **styles[model]
            )
    axes.axhline(_CHANCE, color=figures.INK, linewidth=1.5, linestyle=":", label="chance")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_ylim(0, 1.04)
    axes.set_xlabel("tokens of an example with 4 bindings (trained on 128)")
    axes.set_ylabel("accuracy")
    return _finish(figure, axes, "Associative recall against length")


def _choose_cells(records: Records, corpus: str, table: str = "time") -> dict[str, Record]:
    """Return the cells of a table that did not diverge, or else those of the other table."""
    for name in (table, "parameters", "time"):
        cells = select_text_cells(records, name, corpus)
        judged = {model: cell for model, cell in cells.items() if cell["results"] is not None}
        if judged:
            return judged
    return {}


def _draw_compressors(axes: Axes, records: Records, corpus: str) -> None:
    """Draw a dashed line for each compressor, primed."""
    record = records.get(f"compressors/{corpus}")
    for index, (name, scores) in enumerate((record or {"results": {}})["results"].items()):
        bits = scores["valid"]["primed"]
        line = axes.axhline(
            bits, color="#7a7a7a", linewidth=1.6, zorder=1, label=f"{name}, primed {bits:.3f}"
        )
        line.set_linestyle((0, _DASHES[index % len(_DASHES)]))


def _smooth(values: Sequence[float]) -> list[float]:
    """Return each value averaged with the few before it."""
    parts = [values[max(0, end - _SMOOTHED_POINTS) : end] for end in range(1, len(values) + 1)]
    return [sum(part) / len(part) for part in parts]


def _finish(figure: Figure, axes: Axes, title: str) -> Figure:
    figures.set_look(axes)
    figures.set_title(axes, title)
    figures.add_legend(figure, [axes])
    return figure
