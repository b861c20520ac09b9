"""Figures of a comparison."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from unimatrix.evaluation.units import format_bytes
from unimatrix.reports.compare_results import Records, select_text_cells
from unimatrix.reports.figures import INK, set_look, wrap_label

# Okabe and Ito's palette and a few more; shapes differ as well.
_COLOURS = (
    "#D55E00",
    "#0072B2",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#444444",
    "#8C6D31",
    "#6A3D9A",
    "#A8A800",
)
_MARKERS = ("*", "o", "s", "D", "^", "v", "P", "X", "<", ">")
_DASHES = ((6.0, 3.0), (3.0, 3.0), (1.5, 2.5))
_CHANCE = 1 / 8
_SMOOTHED_POINTS = 5


def list_styles(models: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return a colour and a marker for each model, the same in every figure of a comparison."""
    return {
        model: {
            "color": _COLOURS[index % len(_COLOURS)],
            "marker": _MARKERS[index % len(_MARKERS)],
            "markersize": 13 if index == 0 else 7,
            "linewidth": 2.6 if index == 0 else 1.6,
        }
        for index, model in enumerate(models)
    }


def plot_training(records: Records, corpus: str, styles: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Draw bits per byte of the training windows against seconds and against tokens.

    Args:
        records: of one comparison.
        corpus: its name.
        styles: from ``list_styles``.
    """
    figure = Figure(figsize=(14.0, 6.4), layout="constrained", facecolor="white")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, table, label in zip(
        panels, ("time", "parameters"), ("seconds of training", "tokens of training"), strict=True
    ):
        # A comparison may have one of the two tables alone.
        other = "parameters" if table == "time" else "time"
        cells = select_text_cells(records, table, corpus) or select_text_cells(
            records, other, corpus
        )
        for model, cell in cells.items():
            if cell["results"] is None:
                continue
            last = cell["train_s"] if table == "time" else cell["tokens"]
            steps = [step * last / cell["num_optim_steps"] for step, _ in cell["loss_curve"]]
            bits = _smooth([nats / math.log(2) for _, nats in cell["loss_curve"]])
            style = dict(styles[model]) | {"marker": ""}
            axes.plot(steps, bits, label=wrap_label(model), **style)
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(label)
        _finish(axes)
    panels[0].set_ylabel("bits per byte of training windows")
    _title(panels[0], f"Learning curves, {corpus}")
    _add_legend(figure, panels)
    return figure


def plot_positions(
    records: Records, corpus: str, styles: Mapping[str, Mapping[str, Any]]
) -> Figure:
    """Draw bits per byte against the position in the validation text.

    Args:
        records: of one comparison.
        corpus: its name.
        styles: from ``list_styles``.
    """
    figure = Figure(figsize=(12.8, 7.2), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    for model, cell in _choose_cells(records, corpus).items():
        ends, bits = zip(*cell["results"]["by_position"], strict=True)
        axes.plot(ends, bits, label=wrap_label(model), **styles[model])
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_bytes(value)))
    axes.set_xlabel("bytes read before (ends of bins that double)")
    axes.set_ylabel("bits per byte in the bin")
    _draw_compressors(axes, records, corpus)
    _finish(axes)
    _title(axes, f"Does it use what it read long ago? {corpus}")
    _add_legend(figure, [axes])
    return figure


def plot_state(records: Records, corpus: str, styles: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Draw validation bits per byte against the bytes carried after the longest reading.

    Args:
        records: of one comparison.
        corpus: its name.
        styles: from ``list_styles``.
    """
    figure = Figure(figsize=(12.8, 7.2), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    longest = 0
    for model, cell in _choose_cells(records, corpus).items():
        results = cell["results"]
        sizes = {int(length): count for length, count in results["state_bytes"].items()}
        longest = max(sizes)
        bits = results["valid_bits_per_byte"]
        style = dict(styles[model])
        axes.plot([min(sizes.values()), sizes[longest]], [bits, bits], alpha=0.35, **style)
        axes.plot(
            [sizes[longest]], [bits], label=wrap_label(model), **(style | {"linestyle": "none"})
        )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_bytes(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(f"bytes carried after {longest:,} tokens (pale: after 1,024)")
    axes.set_ylabel("bits per byte, validation")
    _draw_compressors(axes, records, corpus)
    _finish(axes)
    _title(axes, f"Prediction against the state that it needs, {corpus}")
    _add_legend(figure, [axes])
    return figure


def plot_recall(records: Records, styles: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Draw the accuracy of associative recall against the length of the examples.

    Args:
        records: of one comparison.
        styles: from ``list_styles``.
    """
    figure = Figure(figsize=(12.8, 7.2), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    for name, cell in records.items():
        model = name.removeprefix("recall/")
        if not name.startswith("recall/") or cell["status"] != "done":
            continue
        by_length = cell["results"]["accuracy_by_tokens"]
        lengths = [int(length) for length in by_length]
        axes.plot(lengths, list(by_length.values()), label=wrap_label(model), **styles[model])
    axes.axhline(_CHANCE, color=INK, linewidth=1.5, linestyle=":", label="chance")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_ylim(0, 1.04)
    axes.set_xlabel("tokens of an example with 4 bindings (trained on 128)")
    axes.set_ylabel("accuracy")
    _finish(axes)
    _title(axes, "Associative recall against length")
    _add_legend(figure, [axes])
    return figure


def _choose_cells(records: Records, corpus: str) -> dict[str, dict[str, Any]]:
    """Return the cells of equal time, or else of equal parameters, that did not diverge."""
    for table in ("time", "parameters"):
        cells = select_text_cells(records, table, corpus)
        found = {model: cell for model, cell in cells.items() if cell["results"] is not None}
        if found:
            return found
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
    smooth = []
    for index in range(len(values)):
        part = values[max(0, index + 1 - _SMOOTHED_POINTS) : index + 1]
        smooth.append(sum(part) / len(part))
    return smooth


def _finish(axes: Axes) -> None:
    axes.grid(color="#e6e6e6", linewidth=0.9)
    set_look(axes)


def _title(axes: Axes, text: str) -> None:
    """Write a title, in which no dollar starts a formula."""
    axes.set_title(text.replace("$", r"\$"), loc="left", pad=16, fontsize=20, color=INK)


def _add_legend(figure: Figure, panels: Iterable[Axes]) -> None:
    """Draw one legend to the right, each label once."""
    handles: dict[str, Artist] = {}
    for axes in panels:
        handles |= {
            label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
    if handles:
        figure.legend(
            handles.values(),
            handles.keys(),
            loc="outside right upper",
            frameon=False,
            fontsize=12,
            labelcolor=INK,
        )
