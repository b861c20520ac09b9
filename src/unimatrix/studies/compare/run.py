"""A comparison from recipe to records: choose learning rates, train every cell, judge."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from unimatrix.data import WindowDataset
from unimatrix.studies.compare.cells import (
    CompressorCell,
    build_recall_cell,
    build_text_cell,
    choose_learning_rate,
    list_trials,
)
from unimatrix.studies.compare.models import ModelMaker, plan_models
from unimatrix.studies.compare.recipe import Comparison
from unimatrix.studies.compare.texts import Text, open_texts
from unimatrix.studies.engine import Attempt, FolderStore, Say, StudyCell, Watch, run_cells
from unimatrix.studies.records import Record
from unimatrix.train.callbacks import StopOnSignal
from unimatrix.train.run_folder import hold_results, require_unicode_path


def run_comparison(
    comparison: Comparison,
    out: Path,
    *,
    device: str = "cpu",
    say: Say = lambda _: None,
    watch: Watch = lambda: ((), None),
) -> dict[str, Record]:
    """Run every cell that is not yet done; return all records by their folder.

    Args:
        comparison: what to do.
        out: folder of the results; what is there is not done again.
        device: cpu, cuda or mps.
        say: called with a sentence a cell.
        watch: called before each training, for callbacks and a listener to its log.

    Raises:
        InputError: for an unusable comparison, corpus or folder, or one that another process writes
            to; nothing is trained.
        StoppedError: by Ctrl-C; the cell that was training has a checkpoint.
    """
    require_unicode_path(out)
    texts = open_texts(dict.fromkeys((*comparison.corpora, comparison.sweep.corpus)))
    for text in texts.values():
        WindowDataset(text.corpus.train, comparison.text.window_tokens, 1, comparison.seed)
    makers = plan_models(comparison)
    records: dict[str, Record] = {}
    with hold_results(out), StopOnSignal() as stop:
        return run_cells(
            _list_cells(comparison, texts, makers, records),
            FolderStore(out),
            Attempt(device=device, say=say),
            records=records,
            num_cells=count_cells(comparison),
            stop=stop,
            watch=watch,
        )


def count_cells(comparison: Comparison) -> int:
    """Return how many cells a comparison has, compressors included."""
    per_model = len(comparison.sweep.learning_rates)
    for table in comparison.tables:
        per_model += 1 if table == "recall" else len(comparison.corpora)
    return len(comparison.corpora) + per_model * len(comparison.chosen)


def _list_cells(
    comparison: Comparison,
    texts: Mapping[str, Text],
    makers: Sequence[ModelMaker],
    records: Mapping[str, Record],
) -> Iterator[StudyCell]:
    """Yield the cells in order; those after the trials need the records of the trials."""
    corpora = [texts[spec] for spec in comparison.corpora]
    yield from (CompressorCell.build(comparison, text) for text in corpora)
    rates = {}
    for maker in makers:
        trials = list(list_trials(maker, texts[comparison.sweep.corpus]))
        yield from trials
        rates[maker.name] = choose_learning_rate([records[trial.name] for trial in trials])
    for table in comparison.tables:
        if table == "recall":
            yield from (build_recall_cell(maker, rates[maker.name]) for maker in makers)
            continue
        for text in corpora:
            for maker in makers:
                yield build_text_cell(maker, table, text, rates[maker.name])
