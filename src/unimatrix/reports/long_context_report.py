"""A long-context evaluation as one HTML file that needs nothing but itself, its plots beside it."""

import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unimatrix.reports.long_context_results import (
    list_reasons,
    tabulate_code,
    tabulate_models,
    tabulate_positions,
    tabulate_tasks,
)
from unimatrix.reports.page import (
    render_note,
    render_picture,
    render_table,
    require_report_path,
    write_report,
)
from unimatrix.studies.eval_long.run import BOOK
from unimatrix.tasks.ruler import RULER_TASKS

Record = Mapping[str, Any]

_LEDE = (
    "What models make of contexts far longer than those they were trained on: tasks after RULER, a "
    "whole text byte by byte, and completion of code that was held out. Every model gets the same "
    "bytes and writes greedily."
)
_TASKS_NOTE = (
    "RULER's tasks with its numbers of needles, keys, values, hops and repetitions; lengths are "
    "bytes of prompt and answer together, and an answer may take 4 bytes for each token that RULER "
    "allows. Words and wording are our own; essays are cut from the text named above. The score is "
    "the mean share of references that the answer holds, of 100. A question is worded unlike a "
    "needle, as RULER's are: the answer does not continue a sentence of the text. A mean over "
    "fewer than all tasks says of how many."
)
_BOOK_NOTE = (
    "What a byte costs after so many bytes of the same text. A model with state reads it once, its "
    "state carried; one without reads windows, half overlapping, and a byte sees at least half a "
    "window."
)
_CODE_NOTE = (
    "Test files of Python's standard library. Next line: the share of lines written exactly, "
    "indentation included, after the file above as far as the table says. Far names: identifiers "
    "of 4 bytes or more, neither keyword nor builtin, whose last earlier occurrence lies 2,000 "
    "bytes above or farther; right where every byte of the name has the largest logit after the "
    "true bytes before it, and, in the second figure, every byte from the fourth on."
)


def write_long_context_report(record: Record, path: Path) -> None:
    """Write an evaluation as a self-contained HTML file and its plots as PNG beside it.

    Args:
        record: as ``run_long_context`` returns it.
        path: of the HTML file; the PNGs start with its stem. Missing folders are made.

    Raises:
        InputError: if the path cannot be written.
    """
    require_report_path(path)
    pictures = _plot(record)
    body = ["<h1>Long contexts</h1>", f'<p class="lede">{_LEDE}</p>', _describe(record)]
    for title, note, table, picture in (
        ("RULER over bytes", _TASKS_NOTE, tabulate_tasks(record), "tasks"),
        ("A text by position, bits per byte", _BOOK_NOTE, tabulate_positions(record), "positions"),
        ("Code completion, per cent", _CODE_NOTE, tabulate_code(record), ""),
    ):
        if table.rows:
            body += [f"<h2>{title}</h2>", render_note(note)]
            body += [render_picture(pictures[picture], title)] if picture in pictures else []
            body.append(render_table(*table))
    body += ["<h2>Models</h2>", render_table(*tabulate_models(record))]
    reasons = "".join(f"<li>{html.escape(reason)}</li>" for reason in list_reasons(record))
    if reasons:
        body += ["<h2>Not run</h2>", f'<ul class="note">{reasons}</ul>']
    write_report(path, "Long contexts", body, {f"-{name}": png for name, png in pictures.items()})


def _plot(record: Record) -> dict[str, bytes]:
    """Return the plots as PNG by name, as far as there is anything to draw."""
    # Loaded here: whoever writes no report does not wait for matplotlib.
    from unimatrix.reports.figures import render_png
    from unimatrix.reports.long_context_plots import plot_positions, plot_tasks

    done = {cell["task"] for cell in record["cells"] if cell["status"] == "done"}
    pictures = {}
    if done & set(RULER_TASKS):
        pictures["tasks"] = render_png(plot_tasks(record))
    if BOOK in done:
        pictures["positions"] = render_png(plot_positions(record))
    return pictures


def _describe(record: Record) -> str:
    """Return what the figures rest on."""
    plan = record["plan"]
    text = html.escape(", ".join(plan["data"]))
    return render_note(
        f"{plan['num_examples']} examples of a task at a length, seed {record['seed']}; essays and "
        f"text from {text}; on {html.escape(record['device'])}, {html.escape(record['started'])}."
    )
