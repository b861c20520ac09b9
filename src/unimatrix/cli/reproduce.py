"""``unimatrix reproduce``: the paper's claims, run again."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from unimatrix.cli.common import DeviceOption, JsonOption, emit, make_log, pick_device
from unimatrix.errors import InputError
from unimatrix.studies.records import Records, read_records
from unimatrix.studies.reproduce.claims import GROUPS, Outcome, choose_groups, judge_claims
from unimatrix.train.recipe import describe_key

SUMMARY_FILE = "reproduce.json"
MARKDOWN_FILE = "reproduce.md"
REPORT_FILE = "reproduce.html"
_SHOWN_COLUMNS = ("claim", "published", "mean", "verdict")


def run(
    *,
    quick: Annotated[
        bool, typer.Option("--quick", help="One seed instead of three: under ten minutes.")
    ] = False,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="PARTS", help=f"Run these parts only: {','.join(GROUPS)}."),
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Run nothing: make the tables again from the records, and fail if they differ.",
        ),
    ] = False,
    out: Annotated[
        Path, typer.Option("--out", help="Folder of the records; what is there is not run again.")
    ] = Path("results"),
    data: Annotated[
        list[str] | None,
        typer.Option("--data", help="Corpus of the language models instead of `wikitext2`."),
    ] = None,
    valid_data: Annotated[
        list[str] | None, typer.Option("--valid-data", help=describe_key("data.valid_data"))
    ] = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Run every claim of the paper about this architecture again, and say what came of it.

    Byte-level WikiText-2, associative recall, the slot ablation, triple interactions, throughput.
    Each claim gets a verdict: reproduced, better or not reproduced. Writes reproduce.json,
    reproduce.md and reproduce.html beside the records. Run it again to go on where it stopped.
    """
    groups = choose_groups(only or [])
    if check:
        _check(out)
        return

    from unimatrix.reports.claims_report import summarize_claims, write_claims_report
    from unimatrix.studies.engine import StoppedError
    from unimatrix.studies.reproduce.run import ReproductionPlan, reproduce
    from unimatrix.train.run_folder import write_file

    corpus = tuple(data or ("wikitext2",))
    plan = ReproductionPlan(groups, quick, corpus, tuple(valid_data or ()))
    log = make_log()

    def say(text: str) -> None:
        log.print(escape(text), highlight=False)

    try:
        reproduce(plan, out, device=pick_device(device), say=say)
    except StoppedError as stop:
        log.print(
            f"[bold]interrupted[/] in {escape(str(stop))}; run the same command again to go on"
        )
        raise typer.Exit(1) from None
    records = read_records(out)
    for name, text in _write_tables(records).items():
        write_file(out / name, text)
    write_claims_report(records, out / REPORT_FILE)
    outcomes = judge_claims(records, groups)
    result = summarize_claims(outcomes) | {"report": str(out / REPORT_FILE)}
    emit(result, as_json, lambda result: _render(outcomes, groups, result["report"]))


def _write_tables(records: Records) -> dict[str, str]:
    """Return the summary and the Markdown tables of all claims by file name."""
    from unimatrix.reports.claims_report import TITLES, format_claims_group, summarize_claims

    summary = summarize_claims(judge_claims(records))
    tables = [f"## {TITLES[group]}\n\n{format_claims_group(records, group)}" for group in GROUPS]
    return {
        SUMMARY_FILE: json.dumps(summary, indent=2) + "\n",
        MARKDOWN_FILE: f"{summary['rule']}\n\n" + "\n\n".join(tables) + "\n",
    }


def _check(out: Path) -> None:
    """Exit with 1 unless the tables, and the documents beside them, are what the records give."""
    from unimatrix.reports.tables import DOCUMENTS, find_stale_documents

    records, root = read_records(out), out.absolute().parent
    stale = []
    if out.name == "results" and all((root / name).is_file() for name in DOCUMENTS):
        stale += [str(path) for path in find_stale_documents(root, records)]
    for name, text in _write_tables(records).items():
        if not (out / name).is_file():
            raise InputError(f"there is no {out / name} to check; run reproduce without --check")
        if (out / name).read_text(encoding="utf-8") != text:
            stale.append(str(out / name))
    if stale:
        make_log().print(f"[bold red]error:[/] differs from the records: {', '.join(stale)}")
        raise typer.Exit(1)
    sys.stdout.write(f"the tables in {out} are what the records say\n")


def _render(outcomes: Sequence[Outcome], groups: Sequence[str], report: str) -> str:
    """Return the verdicts for people."""
    from unimatrix.reports.claims_report import TITLES, count_verdicts, tabulate_claims

    lines = []
    for group in groups:
        table = tabulate_claims([o for o in outcomes if o.claim.group == group])
        lines += [TITLES[group], ""]
        for name, published, mean, verdict in table.select(_SHOWN_COLUMNS).rows:
            lines.append(f"  {name:<44}{published:>12}{mean or '-':>12}  {verdict}")
        lines.append("")
    counts = ", ".join(f"{n} {verdict}" for verdict, n in count_verdicts(outcomes).items())
    return "\n".join([*lines, f"{counts} (published, ours)", f"report  {report}"])
