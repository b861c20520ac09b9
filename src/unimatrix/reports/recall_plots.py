"""Figures of recall results."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from numpy.typing import ArrayLike, NDArray

from unimatrix.evaluation.units import format_bytes
from unimatrix.reports import figures
from unimatrix.reports.recall_results import (
    INFORMATION_LIMIT_BYTES,
    PUBLISHED_MQAR_B,
    Configuration,
    average_copy_rule,
    format_fraction,
    list_copy_rules,
    list_slices,
    name_rule,
)

# Okabe and Ito's palette, which the colour-blind can tell apart; shapes differ as well.
_PUBLISHED_COLOURS = ("#0072B2", "#56B4E9", "#CC79A7", "#E69F00", "#009E73", "#444444")
_PUBLISHED_MARKERS = ("o", "s", "D", "v", "^", "P")
_OUR_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_OUR_MARKERS = ("*", "o", "D", "s", "^", "v", "P", "X")
_RULE_GREYS = ("#4a4a4a", "#8c8c8c", "#c8c8c8")
_RULE_INKS = ("#1a1a1a", "#7a7a7a", "#7a7a7a")
_RULE_DASHES = ((7.0, 3.0), (3.5, 3.5), (1.5, 2.5))
_UPRIGHT: dict[str, Any] = {
    "textcoords": "offset points",
    "rotation": 90,
    "va": "bottom",
    "fontsize": 12,
}
_TEXT_BOX = {"facecolor": "white", "edgecolor": "none", "pad": 1.5, "alpha": 0.85}
# The published accuracies are known to 0.005: that much is where the stretching stops.
_RESOLUTION = 0.005
_TOP = 1.0013
_ACCURACY_TICKS = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 1.0)


def plot_state_against_accuracy(configurations: Sequence[Configuration]) -> Figure:
    """Draw mean accuracy of mqar-b against bytes of state, with the published points of grid B."""
    figure = figures.start_figure(12.8, 7.2)
    axes = figure.add_subplot()
    groups = {
        "This project": [_draw_ours(axes, each, i) for i, each in enumerate(configurations)],
        "Copy rules, no parameters": _draw_rule_lines(axes, configurations),
        "Published, at 1,024 tokens": _draw_published(axes),
    }
    _set_state_axis(axes, [each.state_bytes for each in configurations])
    _set_stretched_axis(axes, min(0.5, *(min(each.mean_accuracies) for each in configurations)))
    axes.set_xlabel("state of one sequence (log scale)")
    num_slices = len(list_slices(configurations))
    axes.set_ylabel(f"accuracy, mean of {num_slices} slices (stretched towards 1)")
    figures.set_title(axes, "Exact recall against the state that holds it")
    _draw_limit(axes)
    if len(configurations) == 1:
        _draw_reached(axes, configurations[0])
    figures.set_look(axes)
    _draw_legend(axes, groups)
    return figure


def plot_slices(configurations: Sequence[Configuration], slice_label: str) -> Figure:
    """Draw a bar for each slice and configuration, and the copy rules beside them.

    A whisker reaches down to the worst run.

    Args:
        configurations: of one task, at least one.
        slice_label: what the names of its slices say.
    """
    slices, rules = list_slices(configurations), list_copy_rules(configurations)
    ours, copied = "This project, mean and worst run", "Copy rules, no parameters"
    series: list[tuple[str, str, str, dict[str, list[float]]]] = []
    for index, each in enumerate(configurations):
        accuracies = {name: each.accuracies(name) for name in each.slices}
        series.append((ours, each.name, _OUR_COLOURS[index % len(_OUR_COLOURS)], accuracies))
    for index, rule in enumerate(rules):
        means = {name: average_copy_rule(configurations, rule, [name]) for name in slices}
        accuracies = {name: [mean] for name, mean in means.items() if mean is not None}
        series.append((copied, name_rule(rule), _RULE_GREYS[index % len(_RULE_GREYS)], accuracies))
    figure = figures.start_figure(max(11.0, 5.5 + 0.3 * len(series) * len(slices)), 5.6)
    axes = figure.add_subplot()
    width = 0.84 / len(series)
    groups: dict[str, list[Artist]] = {ours: [], copied: []}
    for index, (group, label, colour, accuracies) in enumerate(series):
        groups[group].append(Patch(color=colour, label=figures.wrap_label(label)))
        for name, runs in accuracies.items():
            x = slices.index(name) + (index + 0.5) * width - 0.42
            _draw_bar(axes, x, statistics.mean(runs), min(runs), width, colour)
    axes.set_xticks(range(len(slices)), [figures.wrap_label(name) for name in slices])
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(-0.6, len(slices) - 0.4)
    axes.set_ylim(0, 1.04)
    axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    axes.set_ylabel("accuracy")
    axes.set_xlabel(slice_label)
    figures.set_title(axes, "Recall by slice, beside what copying alone reaches")
    figures.set_look(axes, grid="y")
    _draw_legend(axes, groups)
    return figure


def _draw_ours(axes: Axes, configuration: Configuration, index: int) -> Artist:
    """Draw a configuration as one large marker with the range of its runs."""
    accuracies, state_bytes = configuration.mean_accuracies, configuration.state_bytes
    mean, worst, best = statistics.mean(accuracies), min(accuracies), max(accuracies)
    marker = _OUR_MARKERS[index % len(_OUR_MARKERS)]
    # One colour that no published model has; the shape tells ours apart.
    style: dict[str, Any] = {"color": _OUR_COLOURS[0], "zorder": 5}
    if worst < best:
        # The mean may lie outside the range by a rounding.
        reach = [[max(0.0, mean - worst)], [max(0.0, best - mean)]]
        axes.errorbar([state_bytes], [mean], yerr=reach, elinewidth=2, capsize=6, **style)
    reached = f"{format_fraction(mean)} at {format_bytes(state_bytes)}"
    (points,) = axes.plot(
        [state_bytes],
        [mean],
        marker=marker,
        markersize=24 if marker == "*" else 15,
        markeredgecolor=figures.INK,
        markeredgewidth=1.2,
        linestyle="none",
        label=f"{figures.wrap_label(configuration.name)}\n{reached}",
        **style,
    )
    return points


def _draw_reached(axes: Axes, configuration: Configuration) -> None:
    """Write accuracy and state beside the marker of the only configuration."""
    mean = statistics.mean(configuration.mean_accuracies)
    axes.annotate(
        f"{format_fraction(mean)} in {format_bytes(configuration.state_bytes)}",
        (configuration.state_bytes, mean),
        xytext=(17, -21),
        textcoords="offset points",
        fontsize=15,
        fontweight="bold",
        color=_OUR_COLOURS[0],
        bbox=_TEXT_BOX,
        zorder=4,
    )


def _draw_rule_lines(axes: Axes, configurations: Sequence[Configuration]) -> list[Artist]:
    """Draw a dashed line for each copy rule that every slice has a figure for."""
    slices = list_slices(configurations)
    lines: list[Artist] = []
    for index, rule in enumerate(list_copy_rules(configurations)):
        accuracy = average_copy_rule(configurations, rule, slices)
        if accuracy is None:
            continue
        label = f"{figures.wrap_label(name_rule(rule))} {format_fraction(accuracy)}"
        line = axes.axhline(accuracy, linewidth=2, zorder=1.5, label=label)
        line.set_color(_RULE_INKS[index % len(_RULE_INKS)])
        # Shifted against each other, so that two rules at one height both show.
        line.set_linestyle((9.0 * index, _RULE_DASHES[index % len(_RULE_DASHES)]))
        lines.append(line)
    return lines


def _draw_published(axes: Axes) -> list[Artist]:
    lines: list[Artist] = []
    styles = zip(PUBLISHED_MQAR_B.items(), _PUBLISHED_COLOURS, _PUBLISHED_MARKERS, strict=True)
    for (model, points), colour, marker in styles:
        kibibytes, accuracies = zip(*points, strict=True)
        sizes = [1024 * value for value in kibibytes]
        style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 8}
        lines += axes.plot(sizes, accuracies, linewidth=1.8, zorder=3, label=model, **style)
    return lines


def _draw_limit(axes: Axes) -> None:
    """Draw the fewest bytes that list all bindings of the longest slice."""
    axes.axvline(INFORMATION_LIMIT_BYTES, color=figures.INK, linewidth=1.5, linestyle=":", zorder=1)
    text = f"{INFORMATION_LIMIT_BYTES} bytes list 256 pairs of 12 + 12 bits"
    foot, units = (INFORMATION_LIMIT_BYTES, 0.02), ("data", "axes fraction")
    axes.annotate(text, foot, (-6, 0), units, ha="right", color=figures.INK, **_UPRIGHT)


def _set_state_axis(axes: Axes, ours: Sequence[int]) -> None:
    """Make x logarithmic in bytes, with room for the limit's label and every point."""
    published = 1024 * max(size for points in PUBLISHED_MQAR_B.values() for size, _ in points)
    figures.set_byte_axis(axes)
    axes.set_xlim(min(*ours, INFORMATION_LIMIT_BYTES) / 2, 1.7 * max(*ours, published))
    axes.xaxis.set_major_locator(FixedLocator([4**power for power in range(20)]))
    axes.xaxis.set_minor_locator(NullLocator())


def _set_stretched_axis(axes: Axes, lowest: float) -> None:
    """Make y logarithmic in the error, down to the resolution of the published figures."""
    axes.set_yscale("function", functions=(_stretch, _unstretch))
    axes.set_ylim(max(0.0, lowest - 0.03), _TOP)
    ticks = [tick for tick in _ACCURACY_TICKS if tick >= lowest - 0.03]
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))


def _stretch(accuracy: ArrayLike) -> NDArray[np.float64]:
    error = 1 + _RESOLUTION - np.asarray(accuracy, dtype=np.float64)
    return -np.log10(np.maximum(error, 1e-6))


def _unstretch(height: ArrayLike) -> NDArray[np.float64]:
    return 1 + _RESOLUTION - 10 ** -np.asarray(height, dtype=np.float64)


def _draw_bar(axes: Axes, x: float, height: float, worst: float, width: float, colour: str) -> None:
    """Draw a bar with its height written at its foot, or above it if it is too short."""
    axes.bar(x, height, 0.92 * width, color=colour, zorder=2)
    is_short = height < 0.25
    red, green, blue = to_rgb(colour)
    is_dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.56
    ink = "white" if is_dark and not is_short else figures.INK
    foot = (x, height if is_short else 0)
    text = format_fraction(height)
    axes.annotate(text, foot, (0, 7), ha="center", color=ink, zorder=5, **_UPRIGHT)
    if worst < height:
        axes.plot([x, x], [worst, height], color=figures.INK, linewidth=1.8, zorder=4)
        axes.plot([x], [worst], color=figures.INK, marker="_", markersize=9, zorder=4)


def _draw_legend(axes: Axes, groups: Mapping[str, Sequence[Artist]]) -> None:
    """Draw a legend to the right of the axes, with a heading above each group."""
    handles: list[Artist] = []
    for heading, members in groups.items():
        if members:
            gap = [Patch(alpha=0, label=" ")] if handles else []
            handles += [*gap, Patch(alpha=0, label=heading), *members]
    legend = axes.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(1.01, 1.02),
        frameon=False,
        fontsize=12,
        labelcolor=figures.INK,
        labelspacing=0.55,
        handlelength=2.6,
        markerscale=0.7,
    )
    for text in legend.get_texts():
        if text.get_text() in groups:
            text.set_fontweight("bold")
