"""The tables of the documents: which there are, and how they stand in Markdown.

A document marks the place of a table with ``<!-- table: NAME -->`` and ``<!-- end -->``.
"""

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from unimatrix.errors import InputError, suggest
from unimatrix.reports import bench_tables, compare_results, long_context_results, run_tables
from unimatrix.reports.claims_report import format_claims_group
from unimatrix.reports.headline import tabulate_headline
from unimatrix.reports.text import Table, format_markdown, join
from unimatrix.studies.compare.recipe import DEFAULT_COMPARISON
from unimatrix.studies.records import Record, Records, select_records
from unimatrix.studies.reproduce.claims import GROUPS

DOCUMENTS = (
    "README.md",
    "docs/clients.md",
    "docs/hindsight.md",
    "docs/one-model.md",
    "docs/reader.md",
    "docs/results.md",
)
"""Documents of the checkout that hold tables."""

# A comparison with a table of its own.
_BOOKS = "books"
_NO_COMPARISON = "No comparison is recorded yet."
_MARK = re.compile(r"(<!-- table: ([a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)

Write = Callable[[Records], str]


def render_document(text: str, records: Records) -> str:
    """Return the text of a document with every marked table made anew from ``read_records``.

    Raises:
        InputError: if a mark names no table.
    """

    def replace(match: re.Match[str]) -> str:
        name = match[2]
        if name not in TABLES:
            raise InputError(f"no table is called {name!r}.{suggest(name, TABLES)}")
        return f"{match[1]}{TABLES[name](records)}\n{match[3]}"

    return _MARK.sub(replace, text)


def find_stale_documents(root: Path, records: Records) -> dict[Path, str]:
    """Return the documents of a checkout that the records give another text, with that text."""
    texts = {root / name: (root / name).read_text(encoding="utf-8") for name in DOCUMENTS}
    rendered = {document: render_document(text, records) for document, text in texts.items()}
    return {document: text for document, text in rendered.items() if text != texts[document]}


def _tabulate_bench(records: Records, mode: str) -> Table:
    return bench_tables.tabulate_mode(_read_bench_runs(records), mode)


def _read_bench_runs(records: Records) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of every recorded benchmark by the name of its folder."""
    return {name: run["results"]["rows"] for name, run in select_records(records, "bench/").items()}


def _list_timed_alone(records: Records, part: str) -> list[dict[str, Any]]:
    """Return what benchmarks timed without cells."""
    runs = select_records(records, "bench/").values()
    return [row for run in runs for row in run["results"].get(part, [])]


def _split_comparisons(records: Records) -> dict[str, dict[str, Record]]:
    """Return the records below ``compare/`` by comparison."""
    comparisons: dict[str, dict[str, Record]] = {}
    for name, record in select_records(records, "compare/").items():
        comparison, _, cell = name.partition("/")
        comparisons.setdefault(comparison, {})[cell] = record
    return comparisons


def _join_comparisons(records: Records, build: Callable[[Records], Table]) -> Table:
    """Return a table that each comparison has once, one comparison after the other."""
    return join(
        ({"comparison": name}, build(cells))
        for name, cells in _split_comparisons(records).items()
        if name != _BOOKS
    )


def _join_corpora(cells: Records, kind: str) -> Table:
    """Return a table of language modelling of one comparison, one corpus after the other."""
    return join(
        ({"corpus": corpus}, compare_results.tabulate_text(cells, table, corpus))
        for table, corpus in compare_results.list_text_tables(cells)
        if table == kind
    )


def _tabulate_book_models(records: Records) -> Table:
    """Return the comparison `books`, the best on validation text first."""
    cells = _split_comparisons(records).get(_BOOKS, {})
    table = compare_results.tabulate_text(cells, "time", "books")
    columns = ["model", "valid", "test", "parameters", "steps", "training s", "context"]
    header = ["model", "Middlemarch", "Moby Dick", *columns[3:]]
    return Table(header, table.select(columns).rows)


def _format_evaluations(records: Records, build: Callable[[Mapping[str, Any]], Table]) -> str:
    """Return a table of every recorded long-context evaluation, one after the other."""
    parts = []
    for name, record in select_records(records, "eval-long/").items():
        table, plan = build(record), record["plan"]
        if table.rows:
            text = ", ".join(Path(source).name for source in plan["data"])
            settings = f"text of {text}, {plan['num_examples']} examples, seed {record['seed']}"
            parts.append(f"`{name}`, {settings}:\n\n{format_markdown(table)}")
    return "\n\n".join(parts) or "No evaluation is recorded yet."


def _write(build: Callable[[Records], Table], *nothing: str) -> Write:
    """Return what writes a table in Markdown, or the sentence ``nothing`` where it is empty."""
    return lambda records: format_markdown(build(records), *nothing)


def _write_comparisons(build: Callable[[Records], Table]) -> Write:
    return _write(partial(_join_comparisons, build=build), _NO_COMPARISON)


TABLES: dict[str, Write] = {
    **{
        f"bench-{mode}": _write(partial(_tabulate_bench, mode=mode))
        for mode in ("train", "forward", "prefill", "decode", "step")
    },
    "bench-automaton": _write(
        lambda records: bench_tables.describe_automaton(_list_timed_alone(records, "automaton"))
    ),
    "bench-start": _write(
        lambda records: bench_tables.describe_starts(_list_timed_alone(records, "start"))
    ),
    "speed-summary": _write(
        lambda records: bench_tables.summarize_speed(_read_bench_runs(records))
    ),
    **{f"claims-{group}": partial(format_claims_group, group=group) for group in GROUPS},
    "clients": _write(lambda records: run_tables.tabulate_clients(records["clients"])),
    **{
        f"compare-{table}": _write_comparisons(partial(_join_corpora, kind=table))
        for table in compare_results.TABLE_TITLES
    },
    "compare-compressors": _write_comparisons(compare_results.tabulate_compressors),
    "compare-recall": _write_comparisons(compare_results.tabulate_recall),
    "compare-summary": _write(
        lambda records: compare_results.summarize_text(
            _split_comparisons(records).get(DEFAULT_COMPARISON, {})
        ),
        _NO_COMPARISON,
    ),
    "books": _write(run_tables.tabulate_books, "No book is recorded yet."),
    "book-models": _write(_tabulate_book_models),
    "eval-long": partial(_format_evaluations, build=long_context_results.tabulate_answered),
    "eval-long-code": partial(_format_evaluations, build=long_context_results.tabulate_code),
    "eval-long-text": partial(_format_evaluations, build=long_context_results.tabulate_positions),
    **{
        f"lab-{part}": _write(partial(run_tables.tabulate_lab, prefix=f"lab/{part}/"))
        for part in ("associative", "mqar", "bindings", "others", "options", "hindsight")
    },
    "lab-summary": _write(run_tables.summarize_lab),
    "headline": _write(tabulate_headline),
    "default-run": _write(run_tables.tabulate_default),
    "language": _write(run_tables.tabulate_language),
    "pilot": _write(run_tables.tabulate_pilot),
    "reader": _write(run_tables.tabulate_reader),
    "recall": _write(run_tables.tabulate_recall),
}
"""What writes each table, from the records by folder."""
