"""The claims of the paper as tables, as one HTML page, and as JSON."""

import html
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unimatrix.errors import InputError
from unimatrix.reports.page import (
    render_page,
    render_picture,
    render_table,
    require_report_path,
)
from unimatrix.studies.reproduce.claims import (
    BETTER,
    GROUPS,
    NOT_REPRODUCED,
    REPRODUCED,
    VERDICT_RULE,
    Outcome,
    Records,
    judge_claims,
    list_cells,
    name_run,
)
from unimatrix.train.run_folder import write_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLES = {
    "lm": "Byte-level WikiText-2, 80 steps (bits per byte)",
    "recall": "Associative recall, 4 bindings (per cent)",
    "slots": "Slot ablation, dropout 0 (per cent)",
    "triple": "Triple interactions (per cent)",
    "throughput": "Throughput by length",
}
CLAIMS_HEADER = (
    "claim",
    "published",
    "published code, causal",
    "ours, each seed",
    "mean",
    "verdict",
    "training s",
    "note",
)
_LEDE = (
    "Every table of the paper (arXiv:2604.25930) that concerns this architecture, run again by the "
    "paper's recipes with a causal model."
)
_NAMED_COLOURS = {REPRODUCED: "blue", BETTER: "green", NOT_REPRODUCED: "orange"}
_PER_CENT_GROUPS = ("recall", "slots", "triple")


def tabulate_claims(outcomes: Sequence[Outcome]) -> list[list[str]]:
    """Return a row a claim, in the columns of ``CLAIMS_HEADER``."""
    rows = []
    for outcome in outcomes:
        claim, values = outcome.claim, outcome.values
        bound = "below " if claim.is_upper_bound else ""
        rows.append(
            [
                claim.name,
                bound + _format(outcome, claim.published),
                "" if claim.causal_code is None else _format(outcome, claim.causal_code),
                ", ".join(_format(outcome, value) for value in values),
                _format(outcome, statistics.mean(values)) if values else "",
                outcome.verdict,
                "" if outcome.seconds is None else f"{outcome.seconds:.0f}",
                claim.note,
            ]
        )
    return rows


def tabulate_throughput(records: Records) -> tuple[list[str], list[list[str]]]:
    """Return tokens a second by model and length: the median over the runs."""
    runs = [
        records[name]["results"]["tokens_per_s"]
        for cell in list_cells(["throughput"])
        for seed in cell.seeds
        if (name := name_run(cell, seed)) in records
    ]
    if not runs:
        return ["model"], []
    lengths = list(next(iter(runs[0].values())))
    rows = [
        [model, *(f"{statistics.median(run[model][n] for run in runs):,.0f}" for n in lengths)]
        for model in runs[0]
    ]
    return ["tokens a second", *(f"{length} tokens" for length in lengths)], rows


def count_verdicts(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """Return how many claims have each verdict."""
    found = [outcome.verdict for outcome in outcomes]
    return {verdict: found.count(verdict) for verdict in dict.fromkeys(found)}


def summarize_claims(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return all claims as JSON types."""
    return {
        "rule": VERDICT_RULE,
        "verdicts": count_verdicts(outcomes),
        "claims": [
            {
                "group": outcome.claim.group,
                "name": outcome.claim.name,
                "source": outcome.claim.source,
                "published": outcome.claim.published,
                "causal_code": outcome.claim.causal_code,
                "tolerance": outcome.claim.tolerance,
                "values": outcome.values,
                "seeds": outcome.seeds,
                "train_s": outcome.seconds,
                "verdict": outcome.verdict,
                "note": outcome.claim.note,
            }
            for outcome in outcomes
        ],
    }


def write_claims_report(records: Records, path: Path, groups: Sequence[str] = GROUPS) -> None:
    """Write the claims as a self-contained HTML file and their plot as PNG beside it.

    Args:
        records: of the cells, by folder.
        path: of the HTML file; the PNG has the same stem. Missing folders are made.
        groups: which tables.

    Raises:
        InputError: if nothing was run, or the path cannot be written.
    """
    require_report_path(path)
    outcomes = judge_claims(records, groups)
    if not any(outcome.values for outcome in outcomes):
        raise InputError("no claim was run; run some first")
    from unimatrix.reports.figures import render_png

    path.parent.mkdir(parents=True, exist_ok=True)
    counts = ", ".join(f"{n} {verdict}" for verdict, n in count_verdicts(outcomes).items())
    body = [
        "<h1>The paper, run again</h1>",
        f'<p class="lede">{_LEDE} {html.escape(counts)}.</p>',
        f'<p class="note">{VERDICT_RULE}</p>',
    ]
    if any(map(_is_drawn, outcomes)):
        png = render_png(plot_claims(outcomes))
        write_file(path.with_suffix(".png"), png)
        body.append(render_picture(png, "Published values and ours"))
    for group in groups:
        rows = tabulate_claims([one for one in outcomes if one.claim.group == group])
        body += [f"<h2>{TITLES[group]}</h2>", render_table(CLAIMS_HEADER, rows)]
    header, speeds = tabulate_throughput(records)
    if speeds and "throughput" in groups:
        body.append(render_table(header, speeds))
    write_file(path, render_page("The paper, run again", body))


def plot_claims(outcomes: Sequence[Outcome]) -> "Figure":
    """Draw a row a claim of accuracy or bits: the published value, and ours by seed.

    Args:
        outcomes: of any groups, at least one of accuracy or bits; other scales are left out.

    Returns:
        A figure that belongs to no window and no global state.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    from unimatrix.reports.figures import INK, set_look

    colours = {REPRODUCED: "#0072B2", BETTER: "#009E73", NOT_REPRODUCED: "#D55E00"}
    panels = [
        (group, shown)
        for group in ("lm", *_PER_CENT_GROUPS)
        if (shown := [one for one in outcomes if one.claim.group == group and _is_drawn(one)])
    ]
    heights = [len(shown) for _, shown in panels]
    figure = Figure(
        figsize=(12.8, 1.4 * len(panels) + 0.42 * sum(heights) + 0.8),
        layout=ConstrainedLayoutEngine(h_pad=0.14),
        facecolor="white",
    )
    grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)
    for (group, shown), axes in zip(panels, grid[:, 0], strict=True):
        scale = 100 if group in _PER_CENT_GROUPS else 1
        for row, one in enumerate(reversed(shown)):
            colour = colours.get(one.verdict, "#8c8c8c")
            ours = [scale * value for value in one.values]
            axes.plot(ours, [row] * len(ours), "o", color=colour, markersize=8, alpha=0.8)
            published = [scale * one.claim.published]
            axes.plot(published, [row], "D", color=INK, markersize=9, fillstyle="none", mew=1.8)
        axes.set_yticks(range(len(shown)), [one.claim.name for one in reversed(shown)])
        axes.set_ylim(-0.7, len(shown) - 0.3)
        axes.grid(axis="x", color="#e6e6e6", linewidth=0.9)
        axes.set_title(TITLES[group], loc="left", fontsize=15, color=INK)
        if scale == 100:
            axes.set_xlim(-2, 102)
        set_look(axes)
    names = ", ".join(f"{name}: {colour}" for name, colour in _NAMED_COLOURS.items())
    title = f"Diamonds: published. Dots: ours by seed ({names})"
    figure.suptitle(title, x=0.01, ha="left", fontsize=14, color=INK)
    return figure


def _is_drawn(outcome: Outcome) -> bool:
    """Return whether a claim was run and lies on its group's scale: sizes and ratios do not."""
    claim = outcome.claim
    is_size = claim.metric.startswith("parameters")
    return bool(outcome.values) and not is_size and claim.group in ("lm", *_PER_CENT_GROUPS)


def _format(outcome: Outcome, value: float) -> str:
    """Return a value in the unit of its table."""
    claim = outcome.claim
    if claim.metric.startswith("parameters"):
        return f"{value:,.0f}"
    if claim.group in _PER_CENT_GROUPS:
        return f"{100 * value:.1f}" if value == 1 or value < 0.9995 else "> 99.9"
    return f"{value:.3f}" if claim.group == "lm" else f"{value:.2f}"
