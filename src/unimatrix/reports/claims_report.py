"""The claims of the paper as tables, as one HTML page, and as JSON."""

import html
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unimatrix.errors import InputError
from unimatrix.reports.page import Page, render_note, render_table
from unimatrix.reports.text import Table, format_markdown, format_percent, tabulate
from unimatrix.studies.records import Records
from unimatrix.studies.reproduce.claims import (
    BETTER,
    GROUPS,
    NOT_REPRODUCED,
    REPRODUCED,
    VERDICT_RULE,
    Outcome,
    judge_claims,
    list_cells,
    name_run,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLES = {
    "lm": "Byte-level WikiText-2, 80 steps (bits per byte)",
    "recall": "Associative recall, 4 bindings (per cent)",
    "slots": "Slot ablation, dropout 0 (per cent)",
    "triple": "Triple interactions (per cent)",
    "throughput": "Throughput by length",
}
_LEDE = (
    "Every table of the paper (arXiv:2604.25930) that concerns this architecture, run again by the "
    "paper's recipes with a causal model."
)
# Colour and its name, by verdict.
_COLOURS = {
    REPRODUCED: ("#0072B2", "blue"),
    BETTER: ("#009E73", "green"),
    NOT_REPRODUCED: ("#D55E00", "orange"),
}
_SUMMARIZED = ("group", "name", "source", "published", "causal_code", "tolerance")
_PER_CENT_GROUPS = ("recall", "slots", "triple")
_DRAWN_GROUPS = ("lm", *_PER_CENT_GROUPS)


def tabulate_claims(outcomes: Sequence[Outcome]) -> Table:
    """Return a row a claim."""
    return tabulate(
        {
            "claim": claim.name,
            "published": ("below " if claim.is_upper_bound else "")
            + _format(outcome, claim.published),
            "published code, causal": _format(outcome, claim.causal_code),
            "ours, each seed": ", ".join(_format(outcome, value) for value in outcome.values),
            "mean": _format(outcome, statistics.mean(outcome.values) if outcome.values else None),
            "verdict": outcome.verdict,
            "training s": "" if outcome.seconds is None else f"{outcome.seconds:.0f}",
            "note": claim.note,
        }
        for outcome in outcomes
        for claim in [outcome.claim]
    )


def tabulate_throughput(records: Records) -> Table:
    """Return tokens a second by model and length: the median over the runs."""
    runs = [
        records[name]["results"]["tokens_per_s"]
        for cell in list_cells(["throughput"])
        for seed in cell.seeds
        if (name := name_run(cell, seed)) in records
    ]
    return tabulate(
        {"tokens a second": model}
        | {
            f"{length} tokens": f"{statistics.median(run[model][length] for run in runs):,.0f}"
            for length in by_length
        }
        for model, by_length in (runs[0] if runs else {}).items()
    )


def format_claims_group(records: Records, group: str) -> str:
    """Return one of the paper's tables, by its group, in Markdown with our values and verdicts."""
    text = format_markdown(tabulate_claims(judge_claims(records, [group])))
    speeds = tabulate_throughput(records)
    return f"{text}\n\n{format_markdown(speeds)}" if group == "throughput" and speeds.rows else text


def count_verdicts(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """Return how many claims have each verdict."""
    return dict(Counter(outcome.verdict for outcome in outcomes))


def summarize_claims(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return all claims as JSON types."""
    return {
        "rule": VERDICT_RULE,
        "verdicts": count_verdicts(outcomes),
        "claims": [
            {name: getattr(outcome.claim, name) for name in _SUMMARIZED}
            | {
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
    outcomes = judge_claims(records, groups)
    counts = ", ".join(f"{n} {verdict}" for verdict, n in count_verdicts(outcomes).items())
    page = Page(path, "The paper, run again", f"{_LEDE} {html.escape(counts)}.")
    if not any(outcome.values for outcome in outcomes):
        raise InputError("no claim was run; run some first")
    page.add(render_note(VERDICT_RULE))
    if any(map(_is_drawn, outcomes)):
        page.add_picture("", plot_claims(outcomes), "Published values and ours")
    for group in groups:
        rows = tabulate_claims([o for o in outcomes if o.claim.group == group])
        page.add(f"<h2>{TITLES[group]}</h2>", render_table(*rows))
    speeds = tabulate_throughput(records)
    if speeds.rows and "throughput" in groups:
        page.add(render_table(*speeds))
    page.write()


def plot_claims(outcomes: Sequence[Outcome]) -> "Figure":
    """Draw a row a claim of accuracy or bits, at least one: the published value, and ours by seed.

    Claims on other scales are left out.
    """
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    from unimatrix.reports.figures import INK, set_figure_title, set_look, start_figure

    panels = {
        group: [o for o in reversed(outcomes) if o.claim.group == group and _is_drawn(o)]
        for group in _DRAWN_GROUPS
    }
    panels = {group: drawn for group, drawn in panels.items() if drawn}
    heights = [len(drawn) for drawn in panels.values()]
    figure = start_figure(12.8, 1.4 * len(panels) + 0.42 * sum(heights) + 0.8)
    figure.set_layout_engine(ConstrainedLayoutEngine(h_pad=0.14))
    grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)
    for (group, drawn), axes in zip(panels.items(), grid[:, 0], strict=True):
        scale = 100 if group in _PER_CENT_GROUPS else 1
        for row, outcome in enumerate(drawn):
            colour, _ = _COLOURS.get(outcome.verdict, ("#8c8c8c", ""))
            ours = [scale * value for value in outcome.values]
            axes.plot(ours, [row] * len(ours), "o", color=colour, markersize=8, alpha=0.8)
            published = [scale * outcome.claim.published]
            axes.plot(published, [row], "D", color=INK, markersize=9, fillstyle="none", mew=1.8)
        axes.set_yticks(range(len(drawn)), [outcome.claim.name for outcome in drawn])
        axes.set_ylim(-0.7, len(drawn) - 0.3)
        axes.set_title(TITLES[group], loc="left", fontsize=15, color=INK)
        if scale == 100:
            axes.set_xlim(-2, 102)
        set_look(axes, grid="x")
    names = ", ".join(f"{verdict}: {name}" for verdict, (_, name) in _COLOURS.items())
    title = f"Diamonds: published. Dots: ours by seed ({names})"
    set_figure_title(figure, title, fontsize=14)
    return figure


def _is_drawn(outcome: Outcome) -> bool:
    """Return whether a claim was run and lies on its group's scale: sizes and ratios do not."""
    is_size = outcome.claim.metric.startswith("parameters")
    return bool(outcome.values) and not is_size and outcome.claim.group in _DRAWN_GROUPS


def _format(outcome: Outcome, value: float | None) -> str:
    """Return a value in the unit of its table; nothing for ``None``."""
    group = outcome.claim.group
    if value is None or group in _PER_CENT_GROUPS:
        return format_percent(value)
    if outcome.claim.metric.startswith("parameters"):
        return f"{value:,.0f}"
    return f"{value:.3f}" if group == "lm" else f"{value:.2f}"
