"""Rows of the benchmark as text: one set of columns for terminal and documents."""

from collections.abc import Mapping, Sequence
from typing import Any

from unimatrix.evaluation.units import format_bytes
from unimatrix.reports.text import Table, tabulate

Row = Mapping[str, Any]

# What documents call each column, and what a terminal has room for.
_COLUMNS = {
    "model": "model",
    "tokens x batch": "tokens",
    "ms": "ms",
    "range": "range",
    "rounds": "n",
    "tokens/s": "tokens/s",
    "ratio to Llama": "/Llama",
    "ratio to the first length": "/first",
    "floor ms": "floor",
    "share of peak": "of peak",
    "share of bandwidth": "of copy",
    "peak bytes": "peak",
    "state bytes": "state",
}
HEADER, SHORT_HEADER = tuple(_COLUMNS), tuple(_COLUMNS.values())
_SUMMARY_MODES = {"train": "train step", "decode": "decoding a token"}
_NOT_SUMMARIZED = ("mamba2", "rwkv", "gla", "gated-deltanet")


def describe_rows(rows: Sequence[Row]) -> list[list[str]]:
    """Return the cells of ``HEADER`` for ``run_bench``'s rows; no column has why one is skipped."""
    return [_describe_row(row) for row in rows]


def _describe_row(row: Row) -> list[str]:
    tokens = f"{row['num_tokens']:,}"
    if row["batch_size"] > 1:
        tokens += f" x {row['batch_size']}"
    if row["skipped"] is not None:
        return [row["model"], tokens, "skipped", *[""] * (len(HEADER) - 3)]
    return [
        row["model"],
        tokens,
        _format_ms(row["median_ms"]),
        f"{_format_ms(row['fastest_ms'])}-{_format_ms(row['slowest_ms'])}",
        str(row["rounds"]),
        f"{row['tokens_per_s']:,.0f}",
        _format_ratio(row["ratio_to_llama"]),
        _format_ratio(row["ratio_to_shortest"]),
        _format_ms(row["floor_ms"]),
        f"{100 * row['peak_share']:.2g} %",
        f"{100 * row['bandwidth_share']:.2g} %" if "bandwidth_share" in row else "",
        "" if row["peak_bytes"] is None else format_bytes(row["peak_bytes"]),
        "" if row["state_bytes"] is None else format_bytes(row["state_bytes"]),
    ]


def describe_automaton(rows: Sequence[Row]) -> Table:
    """Return the table of what ``time_automaton`` returns."""
    return tabulate(
        {
            "text": row["text"],
            "tokens": f"{row['num_tokens']:,}",
            "ms": _format_ms(row["median_ms"]),
            "range": f"{_format_ms(row['fastest_ms'])}-{_format_ms(row['slowest_ms'])}",
            "n": str(row["rounds"]),
            "M bytes/s": f"{row['bytes_per_s'] / 1e6:.3g}",
            "bytes a token": f"{row['state_bytes_per_token']:.1f}",
        }
        for row in rows
    )


def describe_starts(rows: Sequence[Row]) -> Table:
    """Return the table of what ``time_starts`` returns."""
    return tabulate(
        {"model": row["model"], "libraries": "skipped"}
        if row.get("skipped") is not None
        else {
            "model": row["model"],
            "libraries": f"{row['libraries_s']:.2f}",
            "1st token": f"{row['first_token_s']:.2f}",
            "range": f"{row['fastest_s']:.2f}-{row['slowest_s']:.2f}",
            "n": str(row["rounds"]),
            "2nd token": f"{row['second_token_s']:.2f}",
            "1st, first ever": f"{row['first_ever_first_token_s']:.2f}",
            "2nd, first ever": f"{row['first_ever_second_token_s']:.2f}",
        }
        for row in rows
    )


def tabulate_mode(runs: Mapping[str, Sequence[Row]], mode: str) -> Table:
    """Return the rows of one mode of all runs, by the runs' names; empty columns are left out."""
    rows = []
    for name, members in runs.items():
        for row in members:
            if row["mode"] == mode:
                cells = _describe_row(row)
                if row["skipped"] is not None:
                    cells[2] = f"skipped: {row['skipped']}"
                rows.append([name, *cells])
    return drop_empty_columns(["run", *HEADER], rows)


def drop_empty_columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Return header and rows without the columns that no row fills."""
    filled = [i for i in range(len(header)) if not rows or any(cells[i] for cells in rows)]
    return Table([header[i] for i in filled], [[cells[i] for i in filled] for cells in rows])


def summarize_speed(runs: Mapping[str, Sequence[Row]]) -> Table:
    """Return what a reader wants first: our speed beside Llama's, from rows by their run."""
    rows = [
        {"what": _SUMMARY_MODES[row["mode"]], "run": name}
        | dict(zip(HEADER, _describe_row(row), strict=True))
        for name, members in runs.items()
        for row in members
        if row["mode"] in _SUMMARY_MODES
        and row["skipped"] is None
        and row["ratio_to_llama"] is not None
        and row["model"] not in _NOT_SUMMARIZED
    ]
    header = ("what", "run", "model", "tokens x batch", "ms", "ratio to Llama", "state bytes")
    return tabulate(rows).select(header)


def _format_ms(value: float) -> str:
    """Return milliseconds with three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _format_ratio(value: float | None) -> str:
    """Return a ratio with three digits; nothing where there is none."""
    return "" if value is None else f"{value:.3g}"
