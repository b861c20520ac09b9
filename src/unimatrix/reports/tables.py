"""Markdown tables from ``results/**/record.json``, and the documents that hold them.

A document marks the place of a table with ``<!-- table: NAME -->`` and ``<!-- end -->``.
"""

import functools
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from unimatrix.errors import InputError, suggest
from unimatrix.reports.bench_tables import (
    describe_automaton,
    describe_starts,
    summarize_speed,
    tabulate_mode,
)
from unimatrix.reports.claims_report import CLAIMS_HEADER, tabulate_claims, tabulate_throughput
from unimatrix.reports.client_tables import HEADER as CLIENTS_HEADER
from unimatrix.reports.client_tables import tabulate_clients
from unimatrix.reports.compare_results import (
    TABLE_TITLES,
    Table,
    list_text_tables,
    summarize_text,
    tabulate_compressors,
    tabulate_recall,
    tabulate_text,
)
from unimatrix.reports.headline import HEADER as HEADLINE_HEADER
from unimatrix.reports.headline import tabulate_headline
from unimatrix.reports.long_context_results import (
    NOT_RUN,
    tabulate_code,
    tabulate_positions,
    tabulate_tasks,
)
from unimatrix.reports.recall_results import find_copy_rules
from unimatrix.studies.compare.recipe import DEFAULT_COMPARISON
from unimatrix.studies.records import Record, select_records
from unimatrix.studies.reproduce.claims import GROUPS, Claim, judge_claims, load_claims

DOCUMENTS = ("README.md", "docs/clients.md", "docs/hindsight.md", "docs/results.md")
"""Documents of the checkout that hold tables."""

# A comparison with a table of its own.
_BOOKS = "books"
_NO_COMPARISON = "No comparison is recorded yet."
_NO_EVALUATION = "No evaluation is recorded yet."
_SLOTS_OF_TEST = re.compile(r"(\d+) in (\d+) slots$")
_MARK = re.compile(r"(<!-- table: ([a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def render_document(text: str, records: Mapping[str, Record]) -> str:
    """Return a document with every marked table made anew.

    Args:
        text: the document.
        records: by folder, from ``read_records``.

    Raises:
        InputError: if a mark names no table.
    """

    def replace(match: re.Match[str]) -> str:
        name = match[2]
        if name not in TABLES:
            raise InputError(f"no table is called {name!r}.{suggest(name, TABLES)}")
        return f"{match[1]}{TABLES[name](records)}\n{match[3]}"

    return _MARK.sub(replace, text)


def find_stale_documents(root: Path, records: Mapping[str, Record]) -> dict[Path, str]:
    """Return the documents of a checkout that the records give another text, with that text.

    Args:
        root: of the checkout.
        records: by folder, from ``read_records``.
    """
    stale = {}
    for document in (root / name for name in DOCUMENTS):
        text = document.read_text(encoding="utf-8")
        rendered = render_document(text, records)
        if rendered != text:
            stale[document] = rendered
    return stale


def _format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _tabulate_default(records: Mapping[str, Record]) -> str:
    """Return what ``unimatrix train`` without arguments reached."""
    rows = []
    for name, record in select_records(records, "train/").items():
        results = record["results"]
        verdict = (
            "beats xz" if results["bits_per_byte"] < results["xz_bits_per_byte"] else "does not"
        )
        rows.append(
            [
                name,
                f"{results['bits_per_byte']:.3f}",
                f"{results['xz_bits_per_byte']:.3f}",
                f"{results['valid_bytes']:,}",
                f"{record['train_s']:.0f}",
                str(record["seed"]),
                verdict,
            ]
        )
    header = ["run", "bits per byte", "`xz -9e`", "bytes judged", "training s", "seed", "verdict"]
    return _format_table(header, rows)


def _group_seeds(records: Mapping[str, Record], prefix: str) -> dict[str, list[Record]]:
    """Return the records of ``PREFIX/GROUP/seed-N`` by group, seeds in order."""
    groups: dict[str, list[Record]] = {}
    for name, record in sorted(select_records(records, prefix).items()):
        groups.setdefault(name.rpartition("/")[0], []).append(record)
    return groups


def _find_claim(cell: str) -> Claim | None:
    """Return the first claim about a cell, if there is one."""
    _, claims = load_claims()
    return next((claim for claim in claims if claim.cell == cell), None)


def _tabulate_pilot(records: Mapping[str, Record]) -> str:
    """Return the byte-level pilot over seeds beside what was published."""
    rows = []
    for preset, members in _group_seeds(records, "pilot/").items():
        claim = _find_claim(f"pilot/{preset}")
        assert claim is not None, preset
        # The published models leak the future: what counts is their code made causal.
        causal = claim.published if claim.causal_code is None else claim.causal_code
        found = [member["results"]["bits_per_byte"] for member in members]
        mean = statistics.mean(found)
        rows.append(
            [
                preset,
                f"{claim.published:.3f}",
                "" if claim.causal_code is None else f"{causal:.4f}",
                ", ".join(f"{value:.4f}" for value in found),
                f"{mean:.4f}",
                f"{mean - causal:+.4f}",
                "reproduced" if abs(mean - causal) <= 0.05 else "not reproduced",
            ]
        )
    header = [
        "preset",
        "published",
        "published code, causal",
        "ours, each seed",
        "mean",
        "difference",
        "verdict (within 0.05)",
    ]
    return _format_table(header, rows)


def _tabulate_recall(records: Mapping[str, Record]) -> str:
    """Return associative recall over seeds."""
    rows = []
    for group, members in _group_seeds(records, "recall/").items():
        recipe = members[0]["results"]["recipe"]
        by_pairs = {
            pairs: [member["results"]["accuracy"][pairs] for member in members]
            for pairs in ("4", "6", "8")
        }
        four = by_pairs["4"]
        claim = _find_claim(f"recall/{group}")
        rows.append(
            [
                recipe["preset"],
                f"{recipe['dropout']:g}",
                str(recipe["steps"]),
                "" if claim is None else f"{100 * claim.published:.1f}",
                ", ".join(f"{100 * value:.1f}" for value in four),
                f"{100 * statistics.median(four):.1f}",
                f"{100 * min(four):.1f}",
                f"{100 * statistics.median(by_pairs['6']):.1f}",
                f"{100 * statistics.median(by_pairs['8']):.1f}",
            ]
        )
    header = [
        "preset",
        "dropout",
        "steps",
        "published, 4 pairs",
        "ours, 4 pairs, each seed",
        "median",
        "worst",
        "median, 6 pairs",
        "median, 8 pairs",
    ]
    return _format_table(header, rows)


def _read_bench_runs(records: Mapping[str, Record]) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of every recorded benchmark by the name of its folder."""
    return {
        name: record["results"]["rows"]
        for name, record in select_records(records, "bench/").items()
    }


def _tabulate_alone(
    records: Mapping[str, Record],
    part: str,
    describe: Callable[[Sequence[dict[str, Any]]], tuple[list[str], list[list[str]]]],
) -> str:
    """Return what benchmarks timed without cells."""
    found = [
        record["results"].get(part, []) for record in select_records(records, "bench/").values()
    ]
    return _format_table(*describe([row for rows in found for row in rows]))


def _tabulate_bench(records: Mapping[str, Record], mode: str) -> str:
    """Return everything that was timed in one mode."""
    return _format_table(*tabulate_mode(_read_bench_runs(records), mode))


def _tabulate_speed(records: Mapping[str, Record]) -> str:
    """Return train steps and decoding in short."""
    return _format_table(*summarize_speed(_read_bench_runs(records)))


def _format_percent(fraction: float) -> str:
    """Return per cent with two digits; what is not 1 is never shown as 100."""
    return "> 99.99" if 0.99995 <= fraction < 1 else f"{100 * fraction:.2f}"


def _tabulate_lab(records: Mapping[str, Record], prefix: str) -> str:
    """Return the recall lab below a folder, a row a test: mean and worst over seeds."""
    rows = []
    for group, members in _group_seeds(records, prefix).items():
        results = [member["results"] for member in members]
        recipe = results[0]["recipe"]
        for test in results[0]["accuracy"]:
            found = [result["accuracy"][test] for result in results]
            copied = find_copy_rules(results[0], test)
            rows.append(
                [
                    group,
                    test,
                    _format_percent(statistics.mean(found)),
                    _format_percent(min(found)),
                    f"{100 * max(copied.values()):.1f}" if copied else "",
                    f"{len(found)} x {recipe['test_examples']:,}",
                    f"{recipe['steps']:,} x {recipe['batch_size']}, {recipe['learning_rate']:g}",
                    f"{results[0]['state_bytes']:,}",
                    f"{results[0]['parameters']:,}",
                ]
            )
    header = [
        "run",
        "test",
        "mean",
        "worst seed",
        "best copy rule",
        "seeds x examples",
        "steps x batch, learning rate",
        "state bytes",
        "parameters",
    ]
    return _format_table(header, rows)


def _tabulate_summary(records: Mapping[str, Record]) -> str:
    """Return the mean of all tests of each run of the lab, a row a run."""
    rows = []
    for group, members in _group_seeds(records, "lab/").items():
        if group.startswith(("hindsight/", "options/")):
            continue
        results = [member["results"] for member in members]
        found = [
            accuracy
            for result in results
            for test, accuracy in result["accuracy"].items()
            if _has_room(test)
        ]
        copied = [
            max(rules.values()) for result in results for rules in result["copy_rules"].values()
        ]
        rows.append(
            [
                group.partition("/")[2],
                _format_percent(statistics.mean(found)),
                _format_percent(min(found)),
                f"{100 * statistics.mean(copied):.1f}" if copied else "",
                f"{results[0]['state_bytes']:,}",
                f"{results[0]['parameters']:,}",
                f"{statistics.mean(result['train_s'] for result in results):.0f}",
            ]
        )
    header = [
        "task",
        "mean",
        "worst test and seed",
        "best copy rule",
        "state bytes",
        "parameters",
        "training s",
    ]
    return _format_table(header, rows)


def _has_room(test: str) -> bool:
    """Return whether a test gives every pair a slot, as far as its name says."""
    numbers = _SLOTS_OF_TEST.search(test)
    return numbers is None or int(numbers[2]) >= int(numbers[1])


def _tabulate_language(records: Mapping[str, Record]) -> str:
    """Return bits per byte of models that differ in one part, at equal steps: mean over seeds."""
    rows = []
    for group, members in _group_seeds(records, "language/").items():
        corpus, _, variant = group.partition("/")
        results = [member["results"] for member in members]
        found = [result["bits_per_byte"] for result in results]
        rows.append(
            [
                corpus,
                variant,
                f"{statistics.mean(found):.3f}",
                ", ".join(f"{value:.3f}" for value in found),
                f"{results[0]['xz_bits_per_byte']:.3f}",
                f"{results[0]['parameters']:,}",
                f"{members[0]['num_optim_steps']:,}",
                f"{statistics.mean(member['train_s'] for member in members):.0f}",
            ]
        )
    header = [
        "corpus",
        "model",
        "bits per byte",
        "each seed",
        "`xz -9e`",
        "parameters",
        "steps",
        "training s",
    ]
    return _format_table(header, rows)


def _tabulate_books(records: Mapping[str, Record]) -> str:
    """Return what the model of the recipe `books` makes of whole books, beside compressors."""
    found = {
        name: record["results"]
        for name, record in select_records(records, "books/").items()
        if "bytes" in record.get("results", {})  # The training run has results of its own.
    }
    if not found:
        return "No book is recorded yet."
    compressors = dict.fromkeys(c for each in found.values() for c in each.get("compressors", ()))
    rows = []
    for name, results in found.items():
        scores = [results.get("compressors", {}).get(compressor, {}) for compressor in compressors]
        rows.append(
            [
                name,
                f"{results['bytes']:,}",
                results["context"],
                f"{results['state_bytes']:,}",
                f"{results['bits_per_byte']:.3f}",
                *(" / ".join(f"{value:.3f}" for value in score.values()) for score in scores),
                f"{results['parameters']:,}",
            ]
        )
    header = ["text", "bytes", "context", "state bytes", "ours"]
    header += [f"{compressor}, plain / primed" for compressor in compressors]
    return _format_table([*header, "parameters"], rows)


def _tabulate_book_models(records: Mapping[str, Record]) -> str:
    """Return the comparison `books`, the best on validation text first."""
    found = tabulate_text(_split_comparisons(records).get(_BOOKS, {}), "time", "books")
    header = ["model", "valid", "test", "parameters", "steps", "training s", "context"]
    kept = [found.header.index(name) for name in header]
    rows = [[row[index] for index in kept] for row in found.rows]
    return _format_table(["model", "Middlemarch", "Moby Dick", *header[3:]], rows)


def _split_comparisons(records: Mapping[str, Record]) -> dict[str, dict[str, Record]]:
    """Return the records below ``compare/`` by comparison."""
    found: dict[str, dict[str, Record]] = {}
    for name, record in select_records(records, "compare/").items():
        comparison, _, cell = name.partition("/")
        found.setdefault(comparison, {})[cell] = record
    return found


def _tabulate_comparison(records: Mapping[str, Record], table: str) -> str:
    """Return a table of language modelling of every comparison, one corpus after the other."""
    rows: list[list[str]] = []
    header = ["comparison", "corpus"]
    for comparison, cells in _split_comparisons(records).items():
        for kind, corpus in list_text_tables(cells) if comparison != _BOOKS else ():
            if kind == table:
                found = tabulate_text(cells, table, corpus)
                header = ["comparison", "corpus", *found.header]
                rows += [[comparison, corpus, *row] for row in found.rows]
    return _format_table(header, rows) if rows else _NO_COMPARISON


def _summarize_comparisons(records: Mapping[str, Record]) -> str:
    """Return bits per byte of the default comparison, a column a corpus and budget."""
    header, rows = summarize_text(_split_comparisons(records).get(DEFAULT_COMPARISON, {}))
    return _format_table(header, rows) if rows else _NO_COMPARISON


def _tabulate_of_comparisons(
    records: Mapping[str, Record], tabulate: Callable[[Mapping[str, Record]], Table]
) -> str:
    """Return a table that each comparison has once, one comparison after the other."""
    rows: list[list[str]] = []
    header = ["comparison"]
    for comparison, cells in _split_comparisons(records).items():
        found = tabulate(cells)
        if found.rows and comparison != _BOOKS:
            header = ["comparison", *found.header]
            rows += [[comparison, *row] for row in found.rows]
    return _format_table(header, rows) if rows else _NO_COMPARISON


def _tabulate_eval_long(
    records: Mapping[str, Record], tabulate: Callable[[Mapping[str, Any]], Table]
) -> str:
    """Return a table of every recorded long-context evaluation, one after the other."""
    parts = []
    for name, record in select_records(records, "eval-long/").items():
        found = tabulate(record)
        if found.rows:
            plan = record["plan"]
            text = ", ".join(Path(source).name for source in plan["data"])
            settings = f"text of {text}, {plan['num_examples']} examples, seed {record['seed']}"
            parts.append(f"`{name}`, {settings}:\n\n{_format_table(*found)}")
    return "\n\n".join(parts) or _NO_EVALUATION


def _tabulate_answered(record: Mapping[str, Any]) -> Table:
    """Return the scores of RULER's tasks; those that no model answered share rows."""
    header, rows = tabulate_tasks(record)
    by_task: dict[str, list[list[str]]] = {}
    for row in rows:
        by_task.setdefault(row[0], []).append(row[2:])
    silent: dict[tuple[str, ...], list[str]] = {}
    for task, scores in by_task.items():
        columns = [set(column) - {"", NOT_RUN} for column in zip(*scores, strict=True)]
        if task != "mean" and any(columns) and all(column <= {"0.0"} for column in columns):
            pattern = tuple("0.0" if column else NOT_RUN for column in columns)
            silent.setdefault(pattern, []).append(task)
    hidden = {task for tasks in silent.values() for task in tasks}
    shared = [
        [", ".join(tasks), "all that can read it", *pattern] for pattern, tasks in silent.items()
    ]
    return Table(header, [*shared, *(row for row in rows if row[0] not in hidden)])


def tabulate_claims_group(records: Mapping[str, Record], group: str) -> str:
    """Return the claims of one of the paper's tables, with our values and verdicts.

    Args:
        records: by folder, from ``read_records``.
        group: one of the groups of ``unimatrix reproduce``.
    """
    text = _format_table(CLAIMS_HEADER, tabulate_claims(judge_claims(records, [group])))
    header, speeds = tabulate_throughput(records)
    if group == "throughput" and speeds:
        text += "\n\n" + _format_table(header, speeds)
    return text


def _tabulate_clients(records: Mapping[str, Record]) -> str:
    return _format_table(CLIENTS_HEADER, tabulate_clients(records["clients"]))


TABLES: dict[str, Callable[[Mapping[str, Record]], str]] = {
    "bench-automaton": functools.partial(
        _tabulate_alone, part="automaton", describe=describe_automaton
    ),
    "bench-decode": functools.partial(_tabulate_bench, mode="decode"),
    "bench-forward": functools.partial(_tabulate_bench, mode="forward"),
    "bench-prefill": functools.partial(_tabulate_bench, mode="prefill"),
    "bench-step": functools.partial(_tabulate_bench, mode="step"),
    "bench-start": functools.partial(_tabulate_alone, part="start", describe=describe_starts),
    "bench-train": functools.partial(_tabulate_bench, mode="train"),
    **{
        f"claims-{group}": functools.partial(tabulate_claims_group, group=group) for group in GROUPS
    },
    "clients": _tabulate_clients,
    **{
        f"compare-{table}": functools.partial(_tabulate_comparison, table=table)
        for table in TABLE_TITLES
    },
    "books": _tabulate_books,
    "book-models": _tabulate_book_models,
    "compare-compressors": functools.partial(
        _tabulate_of_comparisons, tabulate=tabulate_compressors
    ),
    "compare-summary": _summarize_comparisons,
    "compare-recall": functools.partial(_tabulate_of_comparisons, tabulate=tabulate_recall),
    "default-run": _tabulate_default,
    "headline": lambda records: _format_table(HEADLINE_HEADER, tabulate_headline(records)),
    "eval-long": functools.partial(_tabulate_eval_long, tabulate=_tabulate_answered),
    "eval-long-code": functools.partial(_tabulate_eval_long, tabulate=tabulate_code),
    "eval-long-text": functools.partial(_tabulate_eval_long, tabulate=tabulate_positions),
    "lab-associative": functools.partial(_tabulate_lab, prefix="lab/associative/"),
    "lab-mqar": functools.partial(_tabulate_lab, prefix="lab/mqar/"),
    "lab-others": functools.partial(_tabulate_lab, prefix="lab/others/"),
    "lab-options": functools.partial(_tabulate_lab, prefix="lab/options/"),
    "lab-hindsight": functools.partial(_tabulate_lab, prefix="lab/hindsight/"),
    "lab-summary": _tabulate_summary,
    "language": _tabulate_language,
    "pilot": _tabulate_pilot,
    "recall": _tabulate_recall,
    "speed-summary": _tabulate_speed,
}
