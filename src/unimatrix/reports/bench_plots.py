"""Figures of the benchmark: speed against length, and bytes against length."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from unimatrix.evaluation.units import format_bytes
from unimatrix.reports import figures
from unimatrix.train.run_folder import write_file

Row = Mapping[str, Any]

SPEED_FILE, BYTES_FILE = "tokens_per_s.png", "bytes.png"
_TITLES = {
    "train": "Train step",
    "forward": "Forward pass",
    "prefill": "Reading a prompt",
    "decode": "Decoding through generate",
    "step": "One token through forward",
}
# Okabe and Ito's palette, which the colour-blind can tell apart; shapes differ as well.
_STYLES = {
    "unimatrix": ("#D55E00", "*"),
    "sparsepointer": ("#E69F00", "D"),
    "core": ("#CC79A7", "o"),
    "llama": ("#222222", "s"),
    "mamba2": ("#0072B2", "^"),
    "rwkv": ("#56B4E9", "v"),
    "gla": ("#009E73", "P"),
    "gated-deltanet": ("#7A7A7A", "X"),
}
_OTHER_COLOURS = ("#8C564B", "#B8860B", "#6A3D9A", "#1B7837", "#A50026", "#4D4D4D")
_OTHER_MARKERS = ("<", ">", "p", "h", "d", "H")
_PEERS = {
    "llama": "Llama (SDPA)",
    "mamba2": "Mamba-2",
    "rwkv": "RWKV-4",
    "gla": "GLA",
    "gated-deltanet": "Gated DeltaNet",
}
_PANEL_INCHES = (6.1, 4.6)
_MOST_COLUMNS = 3
_PEAK_MODES = ("train", "forward", "prefill")


def write_bench_plots(rows: Sequence[Row], folder: Path) -> None:
    """Write both figures of ``run_bench``'s rows as PNG; nothing without a row that was timed."""
    timed = [row for row in rows if row["skipped"] is None]
    if timed:
        write_file(folder / SPEED_FILE, figures.render_png(plot_speed(timed)))
        write_file(folder / BYTES_FILE, figures.render_png(plot_bytes(timed)))


def plot_speed(rows: Sequence[Row]) -> Figure:
    """Draw tokens a second against length, a panel a mode; at least one row, all of them timed."""
    by_mode = _group_by_mode(rows)
    figure, panels = _start_panels(len(by_mode), "Tokens per second against length")
    for (mode, members), axes in zip(by_mode.items(), panels, strict=True):
        _draw_lines(axes, members, "tokens_per_s")
        _set_axes(axes, members, _TITLES.get(mode, mode))
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _format_count(value)))
    _finish(figure, panels, rows, "tokens per second")
    return figure


def plot_bytes(rows: Sequence[Row]) -> Figure:
    """Draw what a sequence carries and a process's peak in each mode; rows as in ``plot_speed``."""
    measured = [row for row in rows if row["mode"] in _PEAK_MODES and row["peak_bytes"]]
    peaks = _group_by_mode(measured)
    figure, panels = _start_panels(1 + len(peaks), "Bytes against length")
    states = [row for row in rows if row["state_bytes"]]
    _draw_lines(panels[0], states, "state_bytes")
    _set_axes(panels[0], states or rows, "State or cache of one sequence")
    for (mode, members), axes in zip(peaks.items(), panels[1:], strict=True):
        _draw_lines(axes, members, "peak_bytes")
        _set_axes(axes, members, f"Peak of a process: {_TITLES[mode].lower()}")
    for axes in panels:
        _set_byte_ticks(axes)
    _finish(figure, panels, rows, "bytes")
    return figure


def _group_by_mode(rows: Sequence[Row]) -> dict[str, list[Row]]:
    by_mode: dict[str, list[Row]] = {}
    for row in rows:
        by_mode.setdefault(row["mode"], []).append(row)
    return by_mode


def _start_panels(num_panels: int, title: str) -> tuple[Figure, list[Axes]]:
    """Return a figure and its panels in rows of at most three."""
    columns = 2 if num_panels == 4 else min(num_panels, _MOST_COLUMNS)
    lines = math.ceil(num_panels / columns)
    width, height = _PANEL_INCHES
    figure = figures.start_figure(max(1.6, columns) * width, lines * height + 1.3)
    figure.get_layout_engine().set(hspace=0.07, wspace=0.03)  # type: ignore[union-attr, call-arg]
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes in panels[num_panels:]:
        axes.remove()
    figures.set_figure_title(figure, title, fontsize=22)
    return figure, panels[:num_panels]


def _draw_lines(axes: Axes, rows: Sequence[Row], column: str) -> None:
    """Draw a line a model through the values of a column; several of one length show the last."""
    for name in dict.fromkeys(row["model"] for row in rows):
        points = {row["num_tokens"]: row[column] for row in rows if row["model"] == name}
        lengths = sorted(points)
        base, _, variant = name.partition(", ")  # the same model, compiled
        colour, marker = _find_style(base)
        ours = base not in _PEERS
        axes.plot(
            lengths,
            [points[length] for length in lengths],
            color=colour,
            marker=marker,
            markersize=15 if marker == "*" else 9,
            markerfacecolor="white" if variant else colour,
            markeredgecolor=colour if variant else "white",
            markeredgewidth=1.6 if variant else 0.8,
            linewidth=3.2 if name == "unimatrix" else 2.2,
            linestyle="-" if ours else (0, (5, 2)),
            zorder=4 if ours else 3,
            label=_name_line(name),
        )


def _name_line(name: str) -> str:
    """Return what a model is called in the legend."""
    base = name.partition(", ")[0]
    return name.replace(base, _PEERS.get(base, base), 1)


def _find_style(name: str) -> tuple[str, str]:
    """Return the colour and the marker of a model, the same in every figure."""
    number = sum(name.encode())
    other = (_OTHER_COLOURS[number % len(_OTHER_COLOURS)], _OTHER_MARKERS[number % 6])
    return _STYLES.get(name, other)


def _set_axes(axes: Axes, rows: Sequence[Row], title: str) -> None:
    """Make both axes logarithmic, with a tick at every length that was timed."""
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    lengths = sorted({row["num_tokens"] for row in rows})
    axes.xaxis.set_major_locator(FixedLocator(_thin_out(lengths)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _format_length(value)))
    axes.set_xlim(lengths[0] / 1.6, lengths[-1] * 1.6)
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_title(title, loc="left", fontsize=17, color=figures.INK, pad=10)
    axes.set_xlabel("length in tokens", fontsize=14, color=figures.INK)
    figures.set_frame(axes)


def _thin_out(lengths: Sequence[int]) -> list[int]:
    """Return lengths at least 1.9 times apart, so that their labels do not touch."""
    shown: list[int] = []
    for length in lengths:
        if not shown or length >= 1.9 * shown[-1]:
            shown.append(length)
    return shown


def _set_byte_ticks(axes: Axes) -> None:
    """Put the ticks of y at powers of two that read well."""
    low, high = axes.get_ylim()
    first, last = math.floor(math.log2(low)), math.ceil(math.log2(high))
    spacing = max(1, math.ceil((last - first) / 7))
    powers = range(first, last + 1, spacing)
    axes.yaxis.set_major_locator(FixedLocator([2.0**power for power in powers]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_bytes(value)))
    axes.set_ylim(low, high)


def _finish(figure: Figure, panels: Sequence[Axes], rows: Sequence[Row], label: str) -> None:
    """Label y in the first column and draw one legend, models in the order of the rows."""
    for axes in panels:
        if axes.get_subplotspec().is_first_col():  # type: ignore[union-attr]
            axes.set_ylabel(label, fontsize=14, color=figures.INK)
    handles = figures.collect_labels(panels)
    names = map(_name_line, dict.fromkeys(row["model"] for row in rows))
    labels = [name for name in names if name in handles]
    figure.legend(
        [handles[label] for label in labels],
        labels,
        loc="outside lower left",
        ncols=min(len(labels), 6),
        frameon=False,
        fontsize=15,
        labelcolor=figures.INK,
        handlelength=2.8,
    )


def _format_length(value: float) -> str:
    """Return a length with a binary prefix where it is a whole number of them."""
    units = {2**20: "M", 2**10: "k"}
    unit = next((size for size in units if value >= size and value % size == 0), 1)
    return f"{value / unit:,.0f}{units.get(unit, '')}"


def _format_count(value: float) -> str:
    """Return a rate with a decimal prefix."""
    units = {1e9: "G", 1e6: "M", 1e3: "k"}
    unit = next((size for size in units if value >= size), 1)
    return f"{value / unit:g}{units.get(unit, '')}"
