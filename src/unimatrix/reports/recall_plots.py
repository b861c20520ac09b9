"""Figures of recall results."""

import statistics
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from numpy.typing import ArrayLike, NDArray

from unimatrix.evaluation.units import format_bytes
from unimatrix.reports.figures import (
    INK,
    set_byte_axis,
    set_look,
    set_title,
    start_figure,
    wrap_label,
)
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
_PUBLISHED_STYLES = (
    ("#0072B2", "o"),
    ("#56B4E9", "s"),
    ("#CC79A7", "D"),
    ("#E69F00", "v"),
    ("#009E73", "^"),
    ("#444444", "P"),
)
_OUR_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_OUR_MARKERS = ("*", "o", "D", "s", "^", "v", "P", "X")
_RULE_GREYS = ("#4a4a4a", "#8c8c8c", "#c8c8c8")
_RULE_INKS = ("#1a1a1a", "#7a7a7a", "#7a7a7a")
_RULE_DASHES = ((7.0, 3.0), (3.5, 3.5), (1.5, 2.5))
# The published accuracies are known to 0.005: that much is where the stretching stops.
_RESOLUTION = 0.005
_TOP = 1.0013
_ACCURACY_TICKS = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 1.0)


def plot_state_against_accuracy(configurations: Sequence[Configuration]) -> Figure:
    """Draw mean accuracy against bytes of state, with the published points of MQAR grid B.

    Args:
        configurations: of task mqar-b, at least one.
    """
    figure = start_figure(12.8, 7.2)
    axes = figure.add_subplot()
    ours = [_draw_ours(axes, one, index) for index, one in enumerate(configurations)]
    rules = _draw_rule_lines(axes, configurations)
    published = _draw_published(axes)
    _set_state_axis(axes, [one.state_bytes for one in configurations])
    _set_stretched_axis(axes, min(0.5, *(min(one.mean_accuracies) for one in configurations)))
    axes.set_xlabel("state of one sequence (log scale)")
    num_slices = len(list_slices(configurations))
    axes.set_ylabel(f"accuracy, mean of {num_slices} slices (stretched towards 1)")
    set_title(axes, "Exact recall against the state that holds it")
    _draw_limit(axes)
    if len(configurations) == 1:
        _draw_reached(axes, configurations[0])
    set_look(axes)
    _draw_legend(
        axes,
        {
            "This project": ours,
            "Copy rules, no parameters": rules,
            "Published, at 1,024 tokens": published,
        },
    )
    return figure


def plot_slices(configurations: Sequence[Configuration], slice_label: str) -> Figure:
    """Draw a bar for each slice and configuration, and the copy rules beside them.

    Args:
        configurations: of one task, at least one.
        slice_label: what the names of its slices say.
    """
    slices, rules = list_slices(configurations), list_copy_rules(configurations)
    num_bars = len(configurations) + len(rules)
    figure = start_figure(max(11.0, 5.5 + 0.3 * num_bars * len(slices)), 5.6)
    axes = figure.add_subplot()
    width = 0.84 / num_bars
    offsets = [(index + 0.5) * width - 0.42 for index in range(num_bars)]
    ours: list[Artist] = []
    for index, configuration in enumerate(configurations):
        colour = _OUR_COLOURS[index % len(_OUR_COLOURS)]
        _draw_our_bars(axes, configuration, slices, offsets[index], width, colour)
        ours.append(Patch(color=colour, label=wrap_label(configuration.name)))
    copied: list[Artist] = []
    for index, rule in enumerate(rules):
        grey = _RULE_GREYS[index % len(_RULE_GREYS)]
        copied.append(Patch(color=grey, label=wrap_label(name_rule(rule))))
        for x, name in enumerate(slices, start=0):
            height = average_copy_rule(configurations, rule, [name])
            if height is not None:  # None where it was not measured.
                _draw_bar(axes, x + offsets[len(ours) + index], height, width, grey)
    _set_slice_axes(axes, slices)
    axes.set_xlabel(slice_label)
    set_title(axes, "Recall by slice, beside what copying alone reaches")
    set_look(axes, grid="y")
    _draw_legend(
        axes, {"This project, mean and worst run": ours, "Copy rules, no parameters": copied}
    )
    return figure


def _draw_ours(axes: Axes, one: Configuration, index: int) -> Artist:
    """Draw a configuration as one large marker with the range of its runs."""
    found = one.mean_accuracies
    mean = statistics.mean(found)
    reached = f"{format_fraction(mean)} at {format_bytes(one.state_bytes)}"
    marker = _OUR_MARKERS[index % len(_OUR_MARKERS)]
    # One colour that no published model has; the shape tells ours apart.
    colour = _OUR_COLOURS[0]
    if min(found) < max(found):
        axes.errorbar(
            [one.state_bytes],
            [mean],
            yerr=[[max(0.0, mean - min(found))], [max(0.0, max(found) - mean)]],
            color=colour,
            elinewidth=2,
            capsize=6,
            zorder=5,
        )
    (points,) = axes.plot(
        [one.state_bytes],
        [mean],
        color=colour,
        marker=marker,
        markersize=24 if marker == "*" else 15,
        markeredgecolor=INK,
        markeredgewidth=1.2,
        linestyle="none",
        zorder=5,
        label=f"{wrap_label(one.name)}\n{reached}",
    )
    return points


def _draw_reached(axes: Axes, one: Configuration) -> None:
    """Write accuracy and state beside the marker of the only configuration."""
    mean = statistics.mean(one.mean_accuracies)
    axes.annotate(
        f"{format_fraction(mean)} in {format_bytes(one.state_bytes)}",
        (one.state_bytes, mean),
        xytext=(17, -21),
        textcoords="offset points",
        fontsize=15,
        fontweight="bold",
        color=_OUR_COLOURS[0],
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5, "alpha": 0.85},
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
        line = axes.axhline(
            accuracy,
            color=_RULE_INKS[index % len(_RULE_INKS)],
            linewidth=2,
            zorder=1.5,
            label=f"{wrap_label(name_rule(rule))} {format_fraction(accuracy)}",
        )
        # Shifted against each other, so that two rules at one height both show.
        line.set_linestyle((9.0 * index, _RULE_DASHES[index % len(_RULE_DASHES)]))
        lines.append(line)
    return lines


def _draw_published(axes: Axes) -> list[Artist]:
    lines: list[Artist] = []
    for model, (colour, marker) in zip(PUBLISHED_MQAR_B, _PUBLISHED_STYLES, strict=True):
        kibibytes, accuracies = zip(*model.points, strict=True)
        lines += axes.plot(
            [1024 * value for value in kibibytes],
            accuracies,
            color=colour,
            marker=marker,
            markersize=8,
            linewidth=1.8,
            zorder=3,
            label=model.name,
        )
    return lines


def _draw_limit(axes: Axes) -> None:
    """Draw the fewest bytes that list all bindings of the longest slice."""
    axes.axvline(INFORMATION_LIMIT_BYTES, color=INK, linewidth=1.5, linestyle=":", zorder=1)
    axes.annotate(
        f"{INFORMATION_LIMIT_BYTES} bytes list 256 pairs of 12 + 12 bits",
        (INFORMATION_LIMIT_BYTES, 0.02),
        xycoords=("data", "axes fraction"),
        xytext=(-6, 0),
        textcoords="offset points",
        rotation=90,
        ha="right",
        va="bottom",
        fontsize=12,
        color=INK,
    )


def _set_state_axis(axes: Axes, ours: Sequence[int]) -> None:
    """Make x logarithmic in bytes, with room for the limit's label and every point."""
    left = min(*ours, INFORMATION_LIMIT_BYTES) / 2
    published = 1024 * max(kibibytes for model in PUBLISHED_MQAR_B for kibibytes, _ in model.points)
    right = 1.7 * max(*ours, published)
    set_byte_axis(axes)
    axes.set_xlim(left, right)
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


def _draw_our_bars(
    axes: Axes,
    configuration: Configuration,
    slices: Sequence[str],
    offset: float,
    width: float,
    colour: str,
) -> None:
    """Draw a bar a slice, with a whisker down to the worst run."""
    for name in configuration.slices:
        accuracies = configuration.accuracies(name)
        mean, worst, x = statistics.mean(accuracies), min(accuracies), slices.index(name) + offset
        _draw_bar(axes, x, mean, width, colour)
        if worst < mean:
            axes.plot([x, x], [worst, mean], color=INK, linewidth=1.8, zorder=4)
            axes.plot([x], [worst], color=INK, marker="_", markersize=9, zorder=4)


def _draw_bar(axes: Axes, x: float, height: float, width: float, colour: str) -> None:
    """Draw a bar with its height written at its foot, or above it if it is too short."""
    axes.bar(x, height, 0.92 * width, color=colour, zorder=2)
    is_short = height < 0.25
    red, green, blue = to_rgb(colour)
    is_dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.56
    axes.annotate(
        format_fraction(height),
        (x, height if is_short else 0),
        xytext=(0, 7),
        textcoords="offset points",
        rotation=90,
        ha="center",
        va="bottom",
        fontsize=12,
        color="white" if is_dark and not is_short else INK,
        zorder=5,
    )


def _set_slice_axes(axes: Axes, slices: Sequence[str]) -> None:
    """Give every slice a place on x, and all of 0 to 1 to y."""
    axes.set_xticks(range(len(slices)), [wrap_label(name) for name in slices])
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(-0.6, len(slices) - 0.4)
    axes.set_ylim(0, 1.04)
    axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    axes.set_ylabel("accuracy")


def _draw_legend(axes: Axes, groups: Mapping[str, Sequence[Artist]]) -> None:
    """Draw a legend to the right of the axes, with a heading above each group."""
    handles: list[Artist] = []
    for heading, members in groups.items():
        if not members:
            continue
        if handles:
            handles.append(Patch(alpha=0, label=" "))
        handles += [Patch(alpha=0, label=heading), *members]
    legend = axes.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(1.01, 1.02),
        frameon=False,
        fontsize=12,
        labelcolor=INK,
        labelspacing=0.55,
        handlelength=2.6,
        markerscale=0.7,
    )
    for text in legend.get_texts():
        if text.get_text() in groups:
            text.set_fontweight("bold")
