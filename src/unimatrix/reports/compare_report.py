"""A comparison as one HTML file that needs nothing but itself, its plots beside it as PNG."""

import html
from pathlib import Path
from typing import TYPE_CHECKING

from unimatrix.errors import InputError
from unimatrix.reports.compare_results import (
    TABLE_TITLES,
    list_corpora,
    list_text_tables,
    tabulate_compressors,
    tabulate_models,
    tabulate_recall,
    tabulate_sweep,
    tabulate_text,
)
from unimatrix.reports.page import (
    render_note,
    render_picture,
    render_table,
    require_report_path,
    write_report,
)
from unimatrix.studies.records import Records

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
    pictures = _plot(finished)
    body = [
        "<h1>Every model in the same harness</h1>",
        f'<p class="lede">{PROTOCOL}</p>',
        *_render_text(finished, pictures),
        *_render_rest(finished, pictures),
    ]
    write_report(path, "Comparison", body, {f"-{name}": png for name, png in pictures.items()})


def _plot(records: Records) -> dict[str, bytes]:
    """Return the plots as PNG by name."""
    # Loaded here: whoever writes no report does not wait for matplotlib.
    from unimatrix.reports import compare_plots
    from unimatrix.reports.figures import list_styles, render_png

    trained = [record["asked"] for record in records.values() if "model" in record["asked"]]
    # The first stands out in the figures: ours, whatever the order of the records.
    trained.sort(key=lambda settings: settings["entry"]["preset"] is None)
    styles = list_styles(dict.fromkeys(settings["model"] for settings in trained))
    figures: dict[str, Figure] = {}
    for corpus in list_corpora(records):
        figures |= {
            f"training-{corpus}": compare_plots.plot_training(records, corpus, styles),
            f"position-{corpus}": compare_plots.plot_positions(records, corpus, styles),
            f"state-{corpus}": compare_plots.plot_state(records, corpus, styles),
        }
    if tabulate_recall(records).rows:
        figures["recall"] = compare_plots.plot_recall(records, styles)
    return {name: render_png(figure) for name, figure in figures.items()}


def _render_text(records: Records, pictures: dict[str, bytes]) -> list[str]:
    """Return the sections of language modelling, one a corpus."""
    parts = []
    for corpus in list_corpora(records):
        title = html.escape(corpus)
        parts.append(f"<h2>Bits per byte, {title}</h2>")
        for table in (table for table, other in list_text_tables(records) if other == corpus):
            parts.append(f"<h3>{TABLE_TITLES[table]}</h3>")
            parts.append(render_table(*tabulate_text(records, table, corpus)))
        parts.append(render_note(_TEXT_NOTE))
        parts += [
            render_picture(pictures[f"{name}-{corpus}"], f"{name} of models on {title}")
            for name in ("training", "position", "state")
        ]
    return parts


def _render_rest(records: Records, pictures: dict[str, bytes]) -> list[str]:
    """Return the sections on compressors, recall, learning rates and models that are not empty."""
    parts = []
    sweep_note = "Validation bits per byte after the sweep's steps."
    for title, note, table, picture in (
        ("Compressors", _COMPRESSOR_NOTE, tabulate_compressors(records), None),
        ("Associative recall", _RECALL_NOTE, tabulate_recall(records), pictures.get("recall")),
        ("Learning rates", sweep_note, tabulate_sweep(records), None),
        ("Models", _MODELS_NOTE, tabulate_models(records), None),
    ):
        if table.rows:
            parts += [f"<h2>{title}</h2>", render_note(note), render_table(*table)]
            if picture is not None:
                parts.append(render_picture(picture, title))
    return parts
