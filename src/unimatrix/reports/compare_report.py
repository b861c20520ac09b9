"""A comparison as one HTML file that needs nothing but itself, its plots beside it as PNG."""

import html
from pathlib import Path

from unimatrix.errors import InputError
from unimatrix.reports import compare_results
from unimatrix.reports.page import Page, render_note, render_table
from unimatrix.studies.records import Records

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
    page = Page(path, "Every model in the same harness", PROTOCOL, window_title="Comparison")
    finished = {n: r for n, r in records.items() if r["status"] in ("done", "failed")}
    if not finished:
        raise InputError("no cell of the comparison is finished; let it run first")
    from unimatrix.reports import compare_plots
    from unimatrix.reports.figures import list_styles

    trained = [record["asked"] for record in finished.values() if "model" in record["asked"]]
    # The first stands out in the figures: ours, whatever the order of the records.
    trained.sort(key=lambda settings: settings["entry"]["preset"] is None)
    styles = list_styles(dict.fromkeys(settings["model"] for settings in trained))
    for corpus in compare_results.list_corpora(finished):
        title = html.escape(corpus)
        page.add(f"<h2>Bits per byte, {title}</h2>")
        for table, other in compare_results.list_text_tables(finished):
            if other == corpus:
                rows = compare_results.tabulate_text(finished, table, corpus)
                page.add(f"<h3>{compare_results.TABLE_TITLES[table]}</h3>", render_table(*rows))
        page.add(render_note(_TEXT_NOTE))
        for name, plot in (
            ("training", compare_plots.plot_training),
            ("position", compare_plots.plot_positions),
            ("state", compare_plots.plot_state),
        ):
            figure = plot(finished, corpus, styles)
            page.add_picture(f"-{name}-{corpus}", figure, f"{name} of models on {title}")
    compressors = compare_results.tabulate_compressors(finished)
    page.add_section("Compressors", _COMPRESSOR_NOTE, compressors)
    recall = compare_results.tabulate_recall(finished)
    page.add_section("Associative recall", _RECALL_NOTE, recall)
    if recall.rows:
        figure = compare_plots.plot_recall(finished, styles)
        page.add_picture("-recall", figure, "Associative recall")
    sweep = compare_results.tabulate_sweep(finished)
    page.add_section("Learning rates", "Validation bits per byte after the sweep's steps.", sweep)
    page.add_section("Models", _MODELS_NOTE, compare_results.tabulate_models(finished))
    page.write()
