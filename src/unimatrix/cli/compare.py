"""``unimatrix compare``: our models and their peers in one harness."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from unimatrix.cli.common import DeviceOption, JsonOption, emit, make_log, pick_device
from unimatrix.cli.terminal import to_text
from unimatrix.studies.compare.recipe import (
    DEFAULT_COMPARISON,
    Comparison,
    choose_corpora,
    choose_models,
    list_comparisons,
    load_comparison,
    shorten,
)
from unimatrix.train.run_folder import DEFAULT_PARENT

REPORT_FILE = "report.html"
# Columns that a terminal has no room for.
_REPORT_ONLY = ("context", "learning rate", "state bytes at 1,024")


RecipeArgument = Annotated[
    str,
    typer.Argument(
        metavar="[RECIPE]",
        help=f"A .toml file, or a shipped comparison: {', '.join(list_comparisons())}.",
    ),
]
QuickOption = Annotated[
    bool, typer.Option("--quick", help="A few steps everywhere: minutes, to see that all runs.")
]
OnlyOption = Annotated[
    list[str] | None,
    typer.Option("--only", metavar="MODEL", help="Run this model only. Repeatable."),
]
DataOption = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        help="Corpus instead of the recipe's: as in `train`, or a folder with train, valid and "
        "test; learning rates are chosen on the first. Repeatable.",
    ),
]
OutOption = Annotated[
    Path | None,
    typer.Option(
        "--out",
        help="Folder of the results; what is finished there is not run again. "
        "[default: runs/compare-RECIPE]",
    ),
]
ReportOption = Annotated[
    Path | None,
    typer.Option(
        "--report", help=f"HTML file of the report. [default: {REPORT_FILE} in the folder]"
    ),
]


def run(
    recipe: RecipeArgument = DEFAULT_COMPARISON,
    *,
    quick: QuickOption = False,
    only: OnlyOption = None,
    data: DataOption = None,
    out: OutOption = None,
    report: ReportOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Compare our presets with their peers: same text, order, optimiser, size and budget.

    Two tables of bits per byte (equal steps, equal training time), associative recall, and
    compressors as the line to beat. A cell trains for as long as the recipe says: three minutes in
    `small`, 80 in `books`. Run it again to go on where it stopped: finished cells are read back, an
    interrupted one continues from its checkpoint (Ctrl-C, exit code 1).
    """
    comparison = load_comparison(recipe)
    if quick:
        comparison = shorten(comparison)
    if data:
        comparison = choose_corpora(comparison, data)
    if only:
        comparison = choose_models(comparison, only)
    folder = out or DEFAULT_PARENT / f"compare-{comparison.name}"
    page = report or folder / REPORT_FILE

    from unimatrix.reports.compare_report import write_compare_report
    from unimatrix.reports.page import require_report_path

    require_report_path(page)
    records = _run_visibly(comparison, folder, pick_device(device))
    write_compare_report(records, page)
    result = {"out": str(folder), "report": str(page), "cells": _summarize(records)}
    emit(result, as_json, lambda result: _render(records, result))


def _run_visibly(comparison: Comparison, folder: Path, device: str) -> dict[str, dict[str, Any]]:
    """Run the comparison with a line a cell, and a progress bar on a terminal."""
    from unimatrix.cli.progress import TrainingProgress
    from unimatrix.evaluation.units import to_bits_per_byte
    from unimatrix.studies.compare.run import run_comparison
    from unimatrix.studies.engine import StoppedError

    log = make_log()
    bars: list[TrainingProgress] = []

    def watch() -> tuple[list[TrainingProgress], Any]:
        for bar in bars:
            bar.close()
        if not log.is_terminal:
            return [], None
        scale = to_bits_per_byte(1.0, 1)
        bars[:] = [TrainingProgress(log, loss_scale=scale, loss_unit="bits a token")]
        return bars[:], bars[0].show_metrics

    def say(text: str) -> None:
        log.print(escape(text), highlight=False)

    try:
        return run_comparison(comparison, folder, device=device, say=say, watch=watch)
    except StoppedError as stop:
        log.print(
            f"[bold]interrupted[/] in {escape(str(stop))}; run the same command again to go on"
        )
        raise typer.Exit(1) from None
    finally:
        for bar in bars:
            bar.close()


def _summarize(records: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return status, training seconds and results of every cell."""
    shown = ("status", "train_s", "num_optim_steps", "tokens_per_s", "parameters", "results")
    return {
        name: {key: record[key] for key in shown if key in record}
        for name, record in records.items()
    }


def _render(records: dict[str, dict[str, Any]], result: dict[str, Any]) -> str:
    """Return the tables for people."""
    from unimatrix.reports.compare_results import (
        TABLE_TITLES,
        list_text_tables,
        tabulate_compressors,
        tabulate_recall,
        tabulate_text,
    )

    tables = {
        f"{corpus}: {TABLE_TITLES[table]}, bits per byte": tabulate_text(records, table, corpus)
        for table, corpus in list_text_tables(records)
    }
    tables["associative recall, per cent"] = tabulate_recall(records)
    tables["compressors, bits per byte"] = tabulate_compressors(records)
    parts = []
    for title, table in tables.items():
        if table.rows:
            header, rows = table.select([n for n in table.header if n not in _REPORT_ONLY])
            shown = Table(title=title, title_justify="left", box=None, pad_edge=False)
            for name in header:
                shown.add_column(name, justify="left" if name == header[0] else "right")
            for row in rows:
                shown.add_row(*map(escape, row))
            parts.append(to_text(shown))
    return "\n\n".join([*parts, f"report  {result['report']}"])
