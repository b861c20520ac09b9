"""``unimatrix eval-long``: long contexts, for our models and any other of transformers."""

from pathlib import Path
from typing import Annotated, Any

import typer

from unimatrix.cli.common import DeviceOption, JsonOption, SeedOption, emit, make_log, pick_device

_QUICK_LENGTHS = (1024, 4096, 16_384)
_QUICK_EXAMPLES = 2


ModelsArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="MODEL...", help="Run folders, saved models, or names on the Hugging Face hub."
    ),
]
TaskOption = Annotated[
    list[str] | None,
    typer.Option(
        "--task",
        help="A task of RULER's (niah_single_1 to 3, niah_multikey_1 to 3, niah_multivalue, "
        "niah_multiquery, vt, cwe, fwe), book or code. Repeatable. [default: all]",
    ),
]
LengthOption = Annotated[
    list[int] | None,
    typer.Option(
        "--length",
        help="Bytes of prompt and answer; book and code read as far as the longest. "
        "Repeatable. [default: 1024 to 1048576, each 4 times the last]",
    ),
]
ExamplesOption = Annotated[
    int | None,
    typer.Option(
        "--examples",
        help="Examples of a task at a length; ten lines and a hundred names of code each. "
        "[default: 10]",
    ),
]
DataOption = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        help="The text of essays and of the book, such as a held-out book: all bytes of files, "
        "a corpus's test split. Repeatable. [default: pystdlib]",
    ),
]
OutOption = Annotated[
    Path | None,
    typer.Option("--out", help="Folder of record.json; what is finished there is not run again."),
]
ReportOption = Annotated[
    Path | None,
    typer.Option("--report", help="HTML file of the report; its plots go beside it as PNG."),
]
QuickOption = Annotated[
    bool, typer.Option("--quick", help="Three lengths up to 16384 and two examples: minutes.")
]


def run(
    model: ModelsArgument,
    *,
    task: TaskOption = None,
    length: LengthOption = None,
    examples: ExamplesOption = None,
    data: DataOption = None,
    out: OutOption = None,
    report: ReportOption = None,
    quick: QuickOption = False,
    seed: SeedOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Measure what models make of long contexts: RULER over bytes, a book, code completion.

    RULER's tasks with its parameters, lengths and limits in bytes; a whole text's bits per byte by
    position; the next line of held-out library sources, and names in them that were last seen 2,000
    bytes above or more. Peers given beside a model stand in the same table. What a model cannot
    read is not run, and the table says why.
    """
    if report is not None:
        from unimatrix.reports.page import require_report_path

        require_report_path(report)
    place = pick_device(device)
    from unimatrix.studies.eval_long.run import LENGTHS, TASKS, LongContextPlan

    num = _QUICK_EXAMPLES if quick and examples is None else examples
    plan = LongContextPlan(
        models=tuple(model),
        tasks=tuple(task or TASKS),
        lengths=tuple(sorted(length or (_QUICK_LENGTHS if quick else LENGTHS))),
        num_examples=LongContextPlan.num_examples if num is None else num,
        seed=seed or 0,
        data=tuple(data) if data else LongContextPlan.data,
    )
    record = _run_visibly(plan, out, place)
    if report is not None:
        from unimatrix.reports.long_context_report import write_long_context_report

        write_long_context_report(record, report)
    paths = {"out": out and str(out), "report": report and str(report)}
    emit(record | paths, as_json, _render)


def _run_visibly(plan: Any, out: Path | None, device: str) -> dict[str, Any]:
    """Run the plan with a progress bar, or a line a cell where there is no terminal."""
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from unimatrix.studies.engine import StoppedError
    from unimatrix.studies.eval_long.run import run_long_context

    log = make_log()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    progress = Progress(*columns, console=log, transient=True, disable=not log.is_terminal)
    try:
        with progress:
            bar = progress.add_task("loading", total=None)

            def start(text: str, total: int) -> None:
                progress.reset(bar, description=escape(text), total=total)
                if not log.is_terminal:
                    log.print(escape(text))

            return run_long_context(
                plan,
                out=out,
                device=device,
                on_start=start,
                on_example=lambda done: progress.update(bar, completed=done),
            )
    except (KeyboardInterrupt, StoppedError):
        advice = "" if out is None else "; run the same command again to go on"
        log.print(f"[bold]interrupted[/]{advice}")
        raise typer.Exit(1) from None


def _render(result: dict[str, Any]) -> str:
    """Return the tables for people."""
    from rich.markup import escape
    from rich.table import Table

    from unimatrix.cli.terminal import to_text
    from unimatrix.reports.long_context_results import (
        list_reasons,
        tabulate_code,
        tabulate_positions,
        tabulate_tasks,
    )

    examples = result["plan"]["num_examples"]
    parts: list[Any] = []
    for title, content, num_names in (
        (f"RULER over bytes, score of 100, {examples} examples each", tabulate_tasks(result), 2),
        ("bits per byte by position", tabulate_positions(result), 1),
        ("code completion, per cent", tabulate_code(result), 1),
    ):
        if content.rows:
            table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
            for index, name in enumerate(content.header):
                table.add_column(escape(name), justify="left" if index < num_names else "right")
            for row in content.rows:
                table.add_row(*map(escape, row))
            parts += [f"[bold]{title}[/]", table, ""]
    parts += [f"not run: {escape(reason)}" for reason in list_reasons(result)]
    for label, model in result["models"].items():
        reads = f"{model['parameters']:,} parameters, reads {model['reads']}"
        parts.append(f"{escape(label)}: {reads}")
    return to_text(*parts)
