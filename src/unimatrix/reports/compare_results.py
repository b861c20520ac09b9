"""Tables of a comparison, from its records by folder."""

import re
from collections.abc import Mapping
from itertools import product
from typing import Any

from unimatrix.reports.text import Table, format_percent, tabulate
from unimatrix.studies.records import Record, Records, select_records

TABLE_TITLES = {
    "parameters": "Equal parameters, equal steps",
    "time": "Equal parameters, equal training time",
}
_BUDGETS = {"parameters": "equal steps", "time": "equal time"}
_TEXT_CELL = re.compile(r"(parameters|time)/([^/]+)/([^/]+)")
_DIVERGED = "diverged"
_TIME_TOLERANCE = 0.15


def list_text_tables(records: Records) -> list[tuple[str, str]]:
    """Return (table, corpus) of every table of language modelling, in order."""
    tables = {(match[1], match[2]) for name in records if (match := _TEXT_CELL.fullmatch(name))}
    return sorted(tables, key=lambda pair: (pair[1], pair[0]))


def list_corpora(records: Records) -> list[str]:
    """Return the corpora that models were compared on."""
    return list(dict.fromkeys(corpus for _, corpus in list_text_tables(records)))


def select_text_cells(records: Records, table: str, corpus: str) -> dict[str, Record]:
    """Return the finished cells of a table by model, the best on validation text first."""
    cells = _select_finished(records, f"{table}/{corpus}/")
    return dict(sorted(cells.items(), key=lambda item: _rank(item[1]["results"])))


def tabulate_text(records: Records, table: str, corpus: str) -> Table:
    """Return a table of language modelling, the best on validation text first.

    With a column of recall where any model learned it.
    """
    has_recall = any(name.startswith("recall/") for name in records)
    rows = []
    for model, cell in select_text_cells(records, table, corpus).items():
        results = cell["results"]
        row = {
            "model": model,
            "valid": _DIVERGED if results is None else _format_bits(results, "valid"),
            "test": _format_bits(results, "test"),
            "parameters": f"{cell['parameters']:,}",
            "steps": results and _format_steps(cell, cell["asked"]["steps"]),
            "training s": results and _format_seconds(cell),
            "tokens/s": results and f"{cell['tokens_per_s']:,.0f}",
            "learning rate": f"{cell['asked']['learning_rate']:g}",
        }
        for length, count in results["state_bytes"].items() if results else ():
            row[f"state bytes at {int(length):,}"] = f"{count:,}"
        if has_recall:
            recall = records.get(f"recall/{model}", {"status": "missing"})
            done = results and recall["status"] == "done"
            accuracies = recall["results"]["accuracy_by_pairs"] if done else {}
            row["recall, 4 bindings"] = format_percent(accuracies.get("4"))
        row["context"] = results and results["context"]
        rows.append({name: text or "" for name, text in row.items()})
    return tabulate(rows)


def summarize_text(records: Records) -> Table:
    """Return bits per byte of every model, a column a corpus and budget.

    On test text, or on validation text where a corpus has no other; a model that was too slow for
    all of the steps says how many it took.
    """
    rows: dict[str, dict[str, str]] = {}
    for table, corpus in list_text_tables(records):
        for model, cell in select_text_cells(records, table, corpus).items():
            row = rows.setdefault(model, {"model": model, "parameters": f"{cell['parameters']:,}"})
            row[f"{corpus}, {_BUDGETS[table]}"] = _summarize_bits(cell)
    return tabulate(rows.values())


def tabulate_compressors(records: Records) -> Table:
    """Return bits per byte of the compressors on the same bytes."""
    rows = []
    for corpus, record in select_records(records, "compressors/").items():
        for compressor, by_split in record["results"].items():
            row = {"corpus": corpus, "compressor": compressor}
            for split, label in product(("valid", "test"), ("plain", "primed")):
                score = by_split.get(split)
                column = split if label == "plain" else f"{split}, primed"
                row[column] = f"{score[label]:.3f}" if score else ""
            rows.append(row)
        for compressor, package in record["missing"].items():
            rows.append({"corpus": corpus, "compressor": compressor, "valid": f"needs {package}"})
    return tabulate(rows)


def tabulate_sweep(records: Records) -> Table:
    """Return validation bits per byte by learning rate; the chosen one is marked."""
    trials: dict[str, dict[float, Record | None]] = {}
    for record in _select_finished(records, "sweep/").values():
        by_rate = trials.setdefault(record["asked"]["model"], {})
        by_rate[record["asked"]["learning_rate"]] = record["results"]
    rates = sorted({rate for by_rate in trials.values() for rate in by_rate})
    rows = []
    for model, by_rate in trials.items():
        best = min(by_rate, key=lambda rate: _rank(by_rate[rate]))
        row = {"model": model}
        for rate in rates:
            bits = _format_bits(by_rate[rate], "valid") or _DIVERGED if rate in by_rate else ""
            row[f"{rate:g}"] = f"{bits} (chosen)" if rate == best else bits
        rows.append(row)
    return tabulate(rows)


def tabulate_models(records: Records) -> Table:
    """Return what each model is, with the size chosen for it."""
    models: dict[str, Record] = {}
    carried: set[str] = set()
    for settings in (record["asked"] for record in records.values()):
        if "model" in settings:
            models.setdefault(settings["model"], settings)
            # Cells of recall do not say what only text depends on.
            carried |= {settings["model"]} if settings.get("carried_automaton") else set()
    rows = []
    for name, settings in models.items():
        entry, size = settings["entry"], settings["size"]
        changes = _format_fields(entry["overrides"])
        row = {
            "model": name,
            "is": f"preset {entry['preset']}" if entry["preset"] else f"peer {entry['peer']}",
            "width": str(size["hidden_size"]),
            "inner width": str(size["inner_size"]),
            "fields changed": changes + (", carried automaton" if name in carried else ""),
            "and for recall": _format_fields(entry["recall_overrides"]),
        }
        rows.append(row)
    return tabulate(rows)


def tabulate_recall(records: Records) -> Table:
    """Return associative recall: per cent by bindings and by length, the best first."""
    rows = []
    for model, cell in select_records(records, "recall/").items():
        if cell["status"] != "done":
            continue
        settings, results = cell["asked"]["recall"], cell["results"]
        by_pairs, by_tokens = results["accuracy_by_pairs"], results["accuracy_by_tokens"]
        row = {"model": model}
        for pairs in settings["test_pairs"]:
            row[f"{pairs} bindings"] = format_percent(by_pairs[str(pairs)])
        for length in settings["test_tokens"]:
            row[f"4 in {length:,} tokens"] = format_percent(by_tokens.get(str(length)))
        row["parameters"] = f"{cell['parameters']:,}"
        row["steps"] = _format_steps(cell, settings["steps"])
        row["training s"] = f"{cell['train_s']:.0f}"
        row["learning rate"] = f"{cell['asked']['learning_rate']:g}"
        rows.append(row)
    header, lines = tabulate(rows)
    return Table(header, sorted(lines, key=lambda line: -float(line[1].removeprefix("> "))))


def _select_finished(records: Records, prefix: str) -> dict[str, Record]:
    cells = select_records(records, prefix)
    return {name: cell for name, cell in cells.items() if cell["status"] in ("done", "failed")}


def _rank(results: Record | None) -> float:
    """Return bits per byte of validation text; infinity where the training diverged."""
    return float("inf") if results is None else float(results["valid_bits_per_byte"])


def _summarize_bits(cell: Record) -> str:
    results = cell["results"]
    if results is None:
        return _DIVERGED
    bits = _format_bits(results, "test") or _format_bits(results, "valid")
    steps = _format_steps(cell, cell["asked"]["steps"])
    return f"{bits} ({steps} steps)" if " of " in steps else bits


def _format_steps(cell: Record, wanted: int | None) -> str:
    """Return the steps taken, and those wanted where there was no time for all."""
    taken = cell["num_optim_steps"]
    return f"{taken:,}" if wanted is None or taken == wanted else f"{taken:,} of {wanted:,}"


def _format_seconds(cell: Record) -> str:
    """Return the seconds taken, and those planned where a busy machine made them differ."""
    taken = cell["train_s"]
    planned = 60 * cell["asked"]["minutes"]
    is_timed = cell["asked"]["steps"] is None
    if is_timed and abs(taken - planned) > _TIME_TOLERANCE * planned:
        return f"{taken:,.0f} (planned {planned:,.0f})"
    return f"{taken:,.0f}"


def _format_bits(results: Record | None, split: str) -> str:
    """Return bits per byte of a split; nothing where there is none."""
    name = f"{split}_bits_per_byte"
    return f"{results[name]:.3f}" if results and name in results else ""


def _format_fields(fields: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in fields.items())
