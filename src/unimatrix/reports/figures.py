"""What the figures of all reports share: their look, labels and format; needs matplotlib."""

import io
import textwrap
from collections.abc import Iterable
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from unimatrix.evaluation.units import format_bytes

Grid = Literal["x", "y", "both"]
"""The axes across which lines are drawn."""

INK = "#222222"
"""Colour of text."""
_GRID = "#e6e6e6"
_DPI = 200
_LEGEND_CHARACTERS = 34
# Okabe and Ito's palette, which the colour-blind can tell apart, and a few more; shapes differ too.
_COLOURS = (
    *("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00"),
    *("#56B4E9", "#444444", "#8C6D31", "#6A3D9A", "#A8A800"),
)
_MARKERS = ("*", "o", "s", "D", "^", "v", "P", "X", "<", ">")


def list_styles(models: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return a colour and a marker for each model, the same in every figure; the first is large."""
    return {
        model: {
            "color": _COLOURS[index % len(_COLOURS)],
            "marker": _MARKERS[index % len(_MARKERS)],
            "markersize": 13 if index == 0 else 7,
            "linewidth": 2.6 if index == 0 else 1.6,
        }
        for index, model in enumerate(models)
    }


def start_figure(width: float, height: float) -> Figure:
    """Return an empty figure of so many inches, which belongs to no window and no global state."""
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def render_png(figure: Figure) -> bytes:
    """Return a figure as the bytes of a PNG, the same for the same figure."""
    buffer = io.BytesIO()
    figure.savefig(
        buffer,
        format="png",
        dpi=_DPI,
        bbox_inches="tight",
        pad_inches=0.25,
        metadata={"Software": None},
    )
    return buffer.getvalue()


def wrap_label(text: str) -> str:
    """Return text of the caller for a figure: wrapped, and with no dollar that starts a formula."""
    return textwrap.fill(escape_formula(text), _LEGEND_CHARACTERS)


def escape_formula(text: str) -> str:
    """Return text of the caller for a figure, in which no dollar starts a formula."""
    return text.replace("$", r"\$")


def set_title(axes: Axes, text: str) -> None:
    """Write the title of a figure that is one panel."""
    axes.set_title(escape_formula(text), loc="left", pad=16, fontsize=20, color=INK)


def set_figure_title(figure: Figure, text: str, *, fontsize: int = 20) -> None:
    """Write the title of a figure of several panels."""
    figure.suptitle(escape_formula(text), x=0.01, ha="left", fontsize=fontsize, color=INK)


def set_look(axes: Axes, *, grid: Grid = "both") -> None:
    """Set fonts that are read from the last row, take the box away, and draw a grid behind."""
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set_fontsize(14)
        axis.label.set_color(INK)
        axis.labelpad = 9
    set_frame(axes, grid=grid)


def set_frame(axes: Axes, *, grid: Grid = "both") -> None:
    """Take the box away and draw a grid behind; the labels stay as they are."""
    axes.grid(axis=grid, color=_GRID, linewidth=0.9)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=13, colors=INK)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color("#8c8c8c")


def set_byte_axis(axes: Axes) -> None:
    """Make x logarithmic in bytes."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_bytes(value)))


def collect_labels(panels: Iterable[Axes]) -> dict[str, Any]:
    """Return what draws each label of the panels, each label once."""
    handles: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    return handles


def add_legend(figure: Figure, panels: Iterable[Axes], *, fontsize: int = 12) -> None:
    """Draw one legend to the right, each label once."""
    handles = collect_labels(panels)
    if handles:
        figure.legend(
            handles.values(),
            handles.keys(),
            loc="outside right upper",
            frameon=False,
            fontsize=fontsize,
            labelcolor=INK,
        )
