"""Rows of a comparison's tables, from its records by folder."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Records = Mapping[str, dict[str, Any]]

TABLE_TITLES = {
    "parameters": "Equal parameters, equal steps",
    "time": "Equal parameters, equal training time",
}
_BUDGETS = {"parameters": "equal steps", "time": "equal time"}
_TEXT_CELL = re.compile(r"(parameters|time)/([^/]+)/([^/]+)")
_DIVERGED = "diverged"
_RECALL = "recall, 4 bindings"
_TIME_TOLERANCE = 0.15


class Table(NamedTuple):
    """A table of texts.

    Attributes:
        header: one a column.
        rows: one a cell.
    """

    header: list[str]
    rows: list[list[str]]


def list_text_tables(records: Records) -> list[tuple[str, str]]:
    """Return (table, corpus) of every table of language modelling, in order."""
    found = dict.fromkeys(
        (match[1], match[2]) for name in records if (match := _TEXT_CELL.fullmatch(name))
    )
    return sorted(found, key=lambda pair: (pair[1], pair[0]))


def list_corpora(records: Records) -> list[str]:
    """Return the corpora that models were compared on."""
    return list(dict.fromkeys(corpus for _, corpus in list_text_tables(records)))


def select_text_cells(records: Records, table: str, corpus: str) -> dict[str, dict[str, Any]]:
    """Return the records of a table by model, the best on validation text first.

    Args:
        records: of one comparison.
        table: ``parameters`` or ``time``.
        corpus: its name.

    Returns:
        finished cells; those that diverged stand last.
    """
    prefix = f"{table}/{corpus}/"
    cells = {
        name.removeprefix(prefix): record
        for name, record in records.items()
        if name.startswith(prefix) and record["status"] in ("done", "failed")
    }

    def rank(name: str) -> float:
        results = cells[name]["results"]
        return float("inf") if results is None else float(results["valid_bits_per_byte"])

    return {name: cells[name] for name in sorted(cells, key=rank)}


def tabulate_text(records: Records, table: str, corpus: str) -> Table:
    """Return a table of language modelling, the best on validation text first.

    With a column of recall where any model was asked for it.
    """
    cells = select_text_cells(records, table, corpus)
    lengths = next(
        (list(cell["results"]["state_bytes"]) for cell in cells.values() if cell["results"]), []
    )
    header = ["model", "valid", "test", "parameters", "steps", "training s", "tokens/s"]
    header += ["learning rate", *(f"state bytes at {int(n):,}" for n in lengths)]
    header += [_RECALL, "context"]
    rows = [
        _write_row(model, cell, lengths, records.get(f"recall/{model}"))
        for model, cell in cells.items()
    ]
    if not any(name.startswith("recall/") for name in records):
        place = header.index(_RECALL)
        header, *rows = (row[:place] + row[place + 1 :] for row in (header, *rows))
    return Table(header, rows)


def summarize_text(records: Records) -> Table:
    """Return bits per byte of every model, a column a corpus and budget.

    On test text, or on validation text where a corpus has no other; a model that was too slow for
    all of the steps says how many it took.
    """
    found: dict[str, dict[str, str]] = {}
    columns: dict[str, None] = {}
    for table, corpus in list_text_tables(records):
        column = f"{corpus}, {_BUDGETS[table]}"
        columns[column] = None
        for model, cell in select_text_cells(records, table, corpus).items():
            row = found.setdefault(model, {"parameters": f"{cell['parameters']:,}"})
            row[column] = _show_bits(cell)
    header = ["model", "parameters", *columns]
    rows = [[model, *(row.get(name, "") for name in header[1:])] for model, row in found.items()]
    return Table(header, rows)


def _show_bits(cell: dict[str, Any]) -> str:
    results = cell["results"]
    if results is None:
        return _DIVERGED
    bits = _bits(results.get("test_bits_per_byte", results["valid_bits_per_byte"]))
    steps = _steps(cell, cell["asked"]["steps"])
    return f"{bits} ({steps} steps)" if " of " in steps else bits


def tabulate_compressors(records: Records) -> Table:
    """Return bits per byte of the compressors on the same bytes."""
    rows = []
    for name, record in records.items():
        if not name.startswith("compressors/"):
            continue
        for compressor, by_split in record["results"].items():
            row = [name.removeprefix("compressors/"), compressor]
            for split in ("valid", "test"):
                score = by_split.get(split)
                row += [_bits(score[kind]) if score else "" for kind in ("plain", "primed")]
            rows.append(row)
        rows += [
            [name.removeprefix("compressors/"), compressor, f"needs {package}", "", "", ""]
            for compressor, package in record["missing"].items()
        ]
    header = ["corpus", "compressor", "valid", "valid, primed", "test", "test, primed"]
    return Table(header, rows)


def tabulate_sweep(records: Records) -> Table:
    """Return validation bits per byte by learning rate; the chosen one is marked."""
    trials: dict[str, dict[float, float | None]] = {}
    for name, record in records.items():
        if name.startswith("sweep/") and record["status"] in ("done", "failed"):
            results = record["results"]
            bits = None if results is None else results["valid_bits_per_byte"]
            by_rate = trials.setdefault(record["asked"]["model"], {})
            by_rate[record["asked"]["learning_rate"]] = bits
    rates = sorted({rate for by_rate in trials.values() for rate in by_rate})
    rows = []
    for model, by_rate in trials.items():
        best = min(by_rate, key=lambda rate: _or_infinite(by_rate[rate]))
        row = [model]
        for rate in rates:
            mark = " (chosen)" if rate == best else ""
            row.append(_bits(by_rate[rate]) + mark if rate in by_rate else "")
        rows.append(row)
    return Table(["model", *(f"{rate:g}" for rate in rates)], rows)


def tabulate_models(records: Records) -> Table:
    """Return what each model is, with the size chosen for it."""
    found: dict[str, dict[str, Any]] = {}
    for record in records.values():
        if "model" in record["asked"]:
            # Cells of recall do not say what only text depends on.
            kept = found.setdefault(record["asked"]["model"], dict(record["asked"]))
            kept["carried_automaton"] = record["asked"].get("carried_automaton", False) or kept.get(
                "carried_automaton", False
            )
    rows = []
    for model, asked in found.items():
        entry, size = asked["entry"], asked["size"]
        rows.append(
            [
                model,
                f"preset {entry['preset']}" if entry["preset"] else f"peer {entry['peer']}",
                str(size["hidden_size"]),
                str(size["inner_size"]),
                _describe_fields(entry["overrides"])
                + (", carried automaton" if asked["carried_automaton"] else ""),
                _describe_fields(entry["recall_overrides"]),
            ]
        )
    header = ["model", "is", "width", "inner width", "fields changed", "and for recall"]
    return Table(header, rows)


def tabulate_recall(records: Records) -> Table:
    """Return associative recall: per cent by bindings and by length."""
    cells = {
        name.removeprefix("recall/"): record
        for name, record in records.items()
        if name.startswith("recall/") and record["status"] == "done"
    }
    settings = next((cell["asked"]["recall"] for cell in cells.values()), None)
    if settings is None:
        return Table(["model"], [])
    header = ["model", *(f"{pairs} bindings" for pairs in settings["test_pairs"])]
    header += [f"4 in {length:,} tokens" for length in settings["test_tokens"]]
    header += ["parameters", "steps", "training s", "learning rate"]
    rows = []
    for model, cell in cells.items():
        results = cell["results"]
        row = [model]
        row += [_percent(results["accuracy_by_pairs"][str(n)]) for n in settings["test_pairs"]]
        row += [
            _percent(results["accuracy_by_tokens"].get(str(n))) for n in settings["test_tokens"]
        ]
        row += [f"{cell['parameters']:,}", _steps(cell, settings["steps"])]
        rows.append([*row, f"{cell['train_s']:.0f}", f"{cell['asked']['learning_rate']:g}"])
    return Table(header, sorted(rows, key=lambda row: -float(row[1].removeprefix("> "))))


def _write_row(
    model: str, cell: dict[str, Any], lengths: Sequence[str], recall: dict[str, Any] | None
) -> list[str]:
    results = cell["results"]
    rate = f"{cell['asked']['learning_rate']:g}"
    if results is None:
        gaps = [""] * (len(lengths) + 2)
        return [model, _DIVERGED, "", f"{cell['parameters']:,}", "", "", "", rate, *gaps]
    accuracy = None
    if recall is not None and recall["status"] == "done":
        accuracy = recall["results"]["accuracy_by_pairs"].get("4")
    return [
        model,
        _bits(results["valid_bits_per_byte"]),
        _bits(results["test_bits_per_byte"]) if "test_bits_per_byte" in results else "",
        f"{cell['parameters']:,}",
        _steps(cell, cell["asked"]["steps"]),
        _seconds(cell),
        f"{cell['tokens_per_s']:,.0f}",
        rate,
        *(f"{results['state_bytes'][length]:,}" for length in lengths),
        _percent(accuracy),
        results["context"],
    ]


def _steps(cell: dict[str, Any], asked: int | None) -> str:
    """Return the steps taken, and those asked for where there was no time for all."""
    taken = cell["num_optim_steps"]
    return f"{taken:,}" if asked is None or taken == asked else f"{taken:,} of {asked:,}"


def _seconds(cell: dict[str, Any]) -> str:
    """Return the seconds taken, and those planned where a busy machine made them differ."""
    taken = cell["train_s"]
    planned = 60 * cell["asked"]["minutes"]
    is_timed = cell["asked"]["steps"] is None
    if is_timed and abs(taken - planned) > _TIME_TOLERANCE * planned:
        return f"{taken:,.0f} (planned {planned:,.0f})"
    return f"{taken:,.0f}"


def _bits(value: float | None) -> str:
    return _DIVERGED if value is None else f"{value:.3f}"


def _percent(fraction: float | None) -> str:
    """Return per cent with one digit; what is not 1 is never shown as 100."""
    if fraction is None:
        return ""
    return "> 99.9" if 0.9995 <= fraction < 1 else f"{100 * fraction:.1f}"


def _describe_fields(fields: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in fields.items())


def _or_infinite(value: float | None) -> float:
    return float("inf") if value is None else value
