"""A comparison as one HTML file that needs nothing but itself, its plots beside it as PNG."""

import html
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from unimatrix.errors import InputError
from unimatrix.reports.compare_results import (
    TABLE_TITLES,
    Records,
    Table,
    list_corpora,
    list_text_tables,
    tabulate_compressors,
    tabulate_models,
    tabulate_recall,
    tabulate_sweep,
    tabulate_text,
)
from unimatrix.reports.page import (
    render_page,
    render_picture,
    render_table,
    require_report_path,
)
from unimatrix.train.run_folder import write_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PROTOCOL = (
    "Every model reads bytes, is trained by the same Trainer on the same windows in the same order "
    "with the same optimiser, and has its learning rate chosen by the same sweep. A model with "
    "state reads the text it is judged on once, its state carried from the first byte to the last. "
    "A Transformer reads windows of its training length, half overlapping, so that every byte sees "
    "at least half a window; reading further would leave what it was trained for. State bytes are "
    "all that is carried to the next token at batch 1; for a Transformer the keys and values of "
    "all tokens read, as far as its positions reach. Where the context comes after so many bytes, "
    "the model's suffix automaton had seen all training text before each window, and the model "
    "read the training text before what it is judged on."
)
_TEXT_NOTE = (
    "Where there was no time for all steps, the table says how far a model got; its schedule fits "
    "the steps that it took. Equal time is planned by timing a few steps; where other work on the "
    "machine made a training 15 per cent longer or shorter, the table says so."
)
_RECALL_NOTE = (
    "Four bindings of a key to a value, filler, and the question for one of them, in 128 tokens; "
    "trained with the same optimiser for the steps of the table, tested on more bindings and on "
    "longer examples. Chance is 12.5 per cent."
)
_MODELS_NOTE = (
    "The inner width (the feed-forward's; the state's in Mamba-2, which has none) is solved for, "
    "at the width whose usual ratio of the two comes nearest to the number of parameters of the "
    "first model; layers and heads are the comparison's. Ours may change fields for recall, where "
    "ids are no bytes."
)
_COMPRESSOR_NOTE = (
    "The line to beat: the same bytes through general-purpose compressors, plain and primed with "
    "the training text."
)


def write_compare_report(records: Records, path: Path) -> None:
    """Write a comparison as a self-contained HTML file and its plots as PNG beside it.

    Args:
        records: of one comparison by folder, as ``run_comparison`` returns them; unfinished ones
            are left out.
        path: of the HTML file; the PNGs start with its stem. Missing folders are made.

    Raises:
        InputError: if no cell is finished, or the path cannot be written.
    """
    require_report_path(path)
    finished = {n: r for n, r in records.items() if r["status"] in ("done", "failed")}
    if not finished:
        raise InputError("no cell of the comparison is finished; let it run first")
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = _plot(finished)
    for name, png in pictures.items():
        write_file(path.with_name(f"{path.stem}-{name}.png"), png)
    body = [
        "<h1>Every model in the same harness</h1>",
        f'<p class="lede">{PROTOCOL}</p>',
        *_render_text(finished, pictures),
        *_render_rest(finished, pictures),
    ]
    write_file(path, render_page("Comparison", body))


def _plot(records: Records) -> dict[str, bytes]:
    """Return the plots as PNG by name."""
    # Loaded here: whoever writes no report does not wait for matplotlib.
    from unimatrix.reports.compare_plots import (
        list_styles,
        plot_positions,
        plot_recall,
        plot_state,
        plot_training,
    )
    from unimatrix.reports.figures import render_png

    asked = [record["asked"] for record in records.values() if "model" in record["asked"]]
    # The first stands out in the figures: ours, whatever the order of the records.
    asked.sort(key=lambda each: each["entry"]["preset"] is None)
    styles = list_styles(dict.fromkeys(each["model"] for each in asked))
    per_corpus: dict[str, Callable[..., Figure]] = {
        "training": plot_training,
        "position": plot_positions,
        "state": plot_state,
    }
    pictures = {
        f"{name}-{corpus}": render_png(plot(records, corpus, styles))
        for corpus in list_corpora(records)
        for name, plot in per_corpus.items()
    }
    if tabulate_recall(records).rows:
        pictures["recall"] = render_png(plot_recall(records, styles))
    return pictures


def _render_text(records: Records, pictures: dict[str, bytes]) -> list[str]:
    """Return the sections of language modelling, one a corpus."""
    parts = []
    tables = list_text_tables(records)
    for corpus in list_corpora(records):
        title = html.escape(corpus)
        parts.append(f"<h2>Bits per byte, {title}</h2>")
        for table in (table for table, of in tables if of == corpus):
            parts.append(f"<h3>{TABLE_TITLES[table]}</h3>")
            parts.append(_render(tabulate_text(records, table, corpus)))
        parts.append(f'<p class="note">{_TEXT_NOTE}</p>')
        parts += [
            render_picture(pictures[f"{name}-{corpus}"], f"{name} of models on {title}")
            for name in ("training", "position", "state")
        ]
    return parts


def _render_rest(records: Records, pictures: dict[str, bytes]) -> list[str]:
    """Return the sections on compressors, recall and learning rates, as far as there are any."""
    parts = []
    sections = (
        ("Compressors", _COMPRESSOR_NOTE, tabulate_compressors(records), None),
        ("Associative recall", _RECALL_NOTE, tabulate_recall(records), pictures.get("recall")),
        (
            "Learning rates",
            "Validation bits per byte after the sweep's steps.",
            tabulate_sweep(records),
            None,
        ),
        ("Models", _MODELS_NOTE, tabulate_models(records), None),
    )
    for title, note, table, picture in sections:
        if table.rows:
            parts += [f"<h2>{title}</h2>", f'<p class="note">{note}</p>', _render(table)]
            if picture is not None:
                parts.append(render_picture(picture, title))
    return parts


def _render(table: Table) -> str:
    return render_table(table.header, table.rows)
