"""What the figures of all reports share: their look, labels and format; needs matplotlib."""

import io
import textwrap

from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK = "#222222"
"""Colour of text."""
_DPI = 200
_LEGEND_CHARACTERS = 34


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
    return textwrap.fill(text.replace("$", r"\$"), _LEGEND_CHARACTERS)


def set_look(axes: Axes) -> None:
    """Set fonts that are read from the last row, and take the box away."""
    axes.set_axisbelow(True)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set_fontsize(14)
        axis.label.set_color(INK)
        axis.labelpad = 9
    axes.tick_params(labelsize=13, colors=INK)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color("#8c8c8c")
