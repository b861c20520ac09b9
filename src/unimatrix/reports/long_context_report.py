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
from unimatrix.reports.page import Page, render_note, render_table
from unimatrix.studies.eval_long.run import BOOK
from unimatrix.tasks.ruler import RULER_TASKS

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


def write_long_context_report(record: Mapping[str, Any], path: Path) -> None:
    """Write an evaluation as a self-contained HTML file and its plots as PNG beside it.

    Args:
        record: as ``run_long_context`` returns it.
        path: of the HTML file; the PNGs start with its stem. Missing folders are made.

    Raises:
        InputError: if the path cannot be written.
    """
    page = Page(path, "Long contexts", _LEDE)
    from unimatrix.reports.long_context_plots import plot_positions, plot_tasks

    plan, place = record["plan"], f"{record['device']}, {record['started']}"
    page.add(
        render_note(
            f"{plan['num_examples']} examples of a task at a length, seed {record['seed']}; essays "
            f"and text from {html.escape(', '.join(plan['data']))}; on {html.escape(place)}."
        )
    )
    done = {cell["task"] for cell in record["cells"] if cell["status"] == "done"}
    tasks = plot_tasks(record) if done & set(RULER_TASKS) else None
    book = plot_positions(record) if BOOK in done else None
    by_position = "A text by position, bits per byte"
    for title, note, table, name, figure in (
        ("RULER over bytes", _TASKS_NOTE, tabulate_tasks(record), "-tasks", tasks),
        (by_position, _BOOK_NOTE, tabulate_positions(record), "-positions", book),
    ):
        if table.rows:
            page.add(f"<h2>{title}</h2>", render_note(note))
            if figure is not None:
                page.add_picture(name, figure, title)
            page.add(render_table(*table))
    page.add_section("Code completion, per cent", _CODE_NOTE, tabulate_code(record))
    page.add("<h2>Models</h2>", render_table(*tabulate_models(record)))
    lines = "".join(f"<li>{html.escape(reason)}</li>" for reason in list_reasons(record))
    if lines:
        page.add("<h2>Not run</h2>", f'<ul class="note">{lines}</ul>')
    page.write()
