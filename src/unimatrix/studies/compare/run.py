"""A comparison from recipe to records: choose learning rates, train every cell, judge."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel, TrainerCallback

from unimatrix.data import ByteStream, Corpus, StreamMatches, WindowDataset, load_corpus
from unimatrix.errors import InputError
from unimatrix.evaluation.byte_costs import ByteCosts, measure_byte_costs
from unimatrix.evaluation.compressors import list_missing_compressors, measure_compressors
from unimatrix.evaluation.footprint import measure_carried_bytes
from unimatrix.evaluation.long_context import bin_by_position
from unimatrix.evaluation.recall import measure_recall
from unimatrix.inference.suffix_matches import match_stream
from unimatrix.studies.compare.cells import (
    Cell,
    Record,
    StoppedError,
    keep_record,
    read_cell,
    run_cell,
)
from unimatrix.studies.compare.models import ModelMaker, plan_models
from unimatrix.studies.compare.recipe import Comparison
from unimatrix.tasks import AssociativeRecall, RotatingDataset
from unimatrix.train.callbacks import StopOnSignal
from unimatrix.train.run_folder import describe_run, hold_results, require_unicode_path

STATE_TOKENS = (1024, 65_536)
"""Lengths at which the bytes carried are counted."""
# Added to the seed, so that no test ever meets a training example.
_TEST_SEED_OFFSET = 2**32
_TOKENS_PER_BATCH = 2**15
_MOST_PER_BATCH = 64

Watch = Callable[[], tuple[Sequence[TrainerCallback], Callable[[dict[str, float]], None] | None]]


@dataclass(frozen=True)
class Text:
    """One corpus of a comparison.

    Attributes:
        spec: what the comparison calls it.
        corpus: its splits.
    """

    spec: str
    corpus: Corpus
    _matches: dict[int | None, StreamMatches] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def match_training_text(self, window: int | None) -> StreamMatches:
        """Return what a suffix automaton says of every training token; it reads them once."""
        if window not in self._matches:
            self._matches[window] = match_stream(self.corpus.train, window)
        return self._matches[window]

    def cut_prime(self, num_bytes: int | None) -> ByteStream:
        """Return so many training bytes from the end, ``None`` for all."""
        train = self.corpus.train
        start = 0 if num_bytes is None else max(0, len(train) - num_bytes)
        return train.slice(start, len(train), name=train.name)

    @cached_property
    def slug(self) -> str:
        """A name for folders and tables."""
        return Path(self.spec.partition(":")[0].rstrip("/")).name


def open_text(spec: str) -> Text:
    """Open a corpus of a comparison.

    Args:
        spec: what ``--data`` takes in `train`, or a folder with the subfolders ``train``, ``valid``
            and ``test``.

    Raises:
        InputError: as in ``load_corpus``.
    """
    folder = Path(spec).expanduser()
    if all((folder / split).is_dir() for split in ("train", "valid", "test")):
        corpus = load_corpus(folder / "train", folder / "valid")
        test = load_corpus(folder / "train", folder / "test").valid
        return Text(spec, replace(corpus, name=folder.name, test=test))
    return Text(spec, load_corpus(spec))


def run_comparison(
    comparison: Comparison,
    out: Path,
    *,
    device: str = "cpu",
    say: Callable[[str], None] = lambda _: None,
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
    specs = dict.fromkeys((*comparison.corpora, comparison.sweep.corpus))
    texts = {spec: open_text(spec) for spec in specs}
    _require_names(texts)
    for text in texts.values():
        WindowDataset(text.corpus.train, comparison.text.window_tokens, 1, comparison.seed)
    makers = plan_models(comparison)
    num_left = count_cells(comparison)
    records: dict[str, Record] = {}
    with hold_results(out), StopOnSignal() as stop:

        def run(cell: Cell) -> Record:
            nonlocal num_left
            callbacks, on_metrics = watch()
            say(f"{cell.name} ({num_left} left)")
            watched = [*callbacks, stop]
            record = run_cell(cell, out, device, callbacks=watched, on_metrics=on_metrics, say=say)
            num_left -= 1
            records[cell.name] = record
            if stop.requested:
                raise StoppedError(cell.name)
            return record

        for spec in comparison.corpora:
            name = f"compressors/{texts[spec].slug}"
            say(f"{name} ({num_left} left)")
            records[name] = run_compressors(comparison, texts[spec], out / name)
            num_left -= 1
        chosen = {}
        for maker in makers:
            trials = [run(cell) for cell in list_trials(maker, texts[comparison.sweep.corpus])]
            chosen[maker.name] = choose_learning_rate(trials)
        for table in comparison.tables:
            if table == "recall":
                for maker in makers:
                    run(build_recall_cell(maker, chosen[maker.name]))
                continue
            for spec in comparison.corpora:
                for maker in makers:
                    run(build_text_cell(maker, table, texts[spec], chosen[maker.name]))
    return records


def count_cells(comparison: Comparison) -> int:
    """Return how many cells a comparison has, compressors included."""
    a_model = len(comparison.sweep.learning_rates)
    for table in comparison.tables:
        a_model += 1 if table == "recall" else len(comparison.corpora)
    return len(comparison.corpora) + a_model * len(comparison.chosen)


def list_trials(maker: ModelMaker, text: Text) -> Iterator[Cell]:
    """Yield the cells in which a model tries the learning rates."""
    sweep, settings = maker.comparison.sweep, maker.comparison.text

    def judge(model: PreTrainedModel) -> dict[str, Any]:
        costs = measure_byte_costs(
            model,
            text.corpus.valid,
            window_tokens=settings.window_tokens,
            limit_bytes=sweep.eval_bytes,
            prime=_choose_prime(maker, text),
        )
        return {"valid_bits_per_byte": costs.bits_per_byte, "valid_bytes": len(costs.nats)}

    for learning_rate in sweep.learning_rates:
        yield _build_cell(
            f"sweep/{maker.name}/lr-{learning_rate:g}",
            maker,
            text,
            learning_rate,
            steps=sweep.steps,
            minutes=sweep.minutes,
            eval_bytes=sweep.eval_bytes,
            judge=judge,
        )


def choose_learning_rate(trials: Sequence[Record]) -> float:
    """Return the learning rate of the trial with the fewest bits; diverged trials do not count.

    Raises:
        InputError: if all diverged.
    """
    good = [trial for trial in trials if trial["status"] == "done"]
    if not good:
        raise InputError(
            f"{trials[0]['asked']['model']} diverged at every learning rate of the sweep; add a "
            "smaller one to sweep.learning_rates"
        )
    best = min(good, key=lambda trial: trial["results"]["valid_bits_per_byte"])
    return float(best["asked"]["learning_rate"])


def build_text_cell(maker: ModelMaker, table: str, text: Text, learning_rate: float) -> Cell:
    """Return a cell of a table of language modelling."""
    settings = maker.comparison.text

    def judge(model: PreTrainedModel) -> dict[str, Any]:
        prime = _choose_prime(maker, text)

        def measure(stream: ByteStream) -> ByteCosts:
            return measure_byte_costs(
                model,
                stream,
                window_tokens=settings.window_tokens,
                limit_bytes=settings.eval_bytes,
                prime=prime,
            )

        valid = measure(text.corpus.valid)
        results = {
            "valid_bits_per_byte": valid.bits_per_byte,
            "valid_bytes": len(valid.nats),
            "context": valid.context,
            "by_position": average_by_position(valid.nats),
            "state_bytes": {
                str(num_tokens): measure_carried_bytes(model, text.corpus.valid, num_tokens, prime)
                for num_tokens in STATE_TOKENS
            },
        }
        if text.corpus.test is not None:
            test = measure(text.corpus.test)
            results |= {"test_bits_per_byte": test.bits_per_byte, "test_bytes": len(test.nats)}
        return results

    return _build_cell(
        f"{table}/{text.slug}/{maker.name}",
        maker,
        text,
        learning_rate,
        steps=settings.steps if table == "parameters" else None,
        minutes=settings.minutes,
        eval_bytes=settings.eval_bytes,
        judge=judge,
    )


def build_recall_cell(maker: ModelMaker, learning_rate: float) -> Cell:
    """Return the cell in which a model learns associative recall."""
    comparison, settings = maker.comparison, maker.comparison.recall
    task = AssociativeRecall()
    train = replace(
        comparison.train,
        batch_size=settings.batch_size,
        learning_rate=learning_rate,
        seed=comparison.seed,
    )
    return Cell(
        name=f"recall/{maker.name}",
        asked=_ask(maker, learning_rate) | {"recall": dataclasses.asdict(settings)},
        build=lambda: maker.build_for_recall(task),
        make_dataset=lambda number: RotatingDataset(
            (task,), comparison.seed, number, settings.batch_size
        ),
        train=train,
        steps=settings.steps,
        minutes=settings.minutes,
        judge=lambda model: _judge_recall(model, comparison, task),
    )


def _judge_recall(
    model: PreTrainedModel, comparison: Comparison, task: AssociativeRecall
) -> dict[str, Any]:
    """Return accuracies by bindings and by length; lengths beyond a position table are left out."""
    settings, seed = comparison.recall, comparison.seed + _TEST_SEED_OFFSET

    def measure(test: AssociativeRecall, num_examples: int) -> float:
        batch_size = min(_MOST_PER_BATCH, max(1, _TOKENS_PER_BATCH // test.window_tokens))
        return measure_recall(model, test, num_examples, seed, batch_size=batch_size)

    longest = task.window_tokens if model.config.model_type == "gpt2" else None
    return {
        "accuracy_by_pairs": {
            str(pairs): measure(AssociativeRecall(pairs), settings.test_examples)
            for pairs in settings.test_pairs
        },
        "accuracy_by_tokens": {
            str(length): measure(AssociativeRecall(window_tokens=length), settings.length_examples)
            for length in settings.test_tokens
            if longest is None or length <= longest
        },
    }


def run_compressors(comparison: Comparison, text: Text, path: Path) -> Record:
    """Return the record of what compressors make of the bytes that the models are judged on."""
    settings = comparison.text
    asked = {
        "corpus": text.slug,
        "sha256": text.corpus.sha256,
        "eval_bytes": settings.eval_bytes,
        "prime_bytes": settings.prime_bytes,
    }
    record = read_cell(path, asked, "missing")
    if record is not None and record["missing"] == list_missing_compressors():
        return record
    prime = text.cut_prime(settings.prime_bytes)
    splits = {"valid": text.corpus.valid, "test": text.corpus.test}
    texts = {
        name: stream.read(0, min(len(stream), settings.eval_bytes)).tobytes()
        for name, stream in splits.items()
        if stream is not None
    }
    scores = measure_compressors(prime.read(0, len(prime)).tobytes(), texts)
    results = {
        name: {split: score._asdict() for split, score in by_split.items()}
        for name, by_split in scores.items()
    }
    record = {
        "status": "done",
        "asked": asked,
        "missing": list_missing_compressors(),
        **describe_run("cpu"),
        "results": results,
    }
    return keep_record(path, record)


def average_by_position(nats: NDArray[np.float32]) -> list[list[float]]:
    """Return [end of the bin in bytes, mean bits per byte in it], bins doubling in length."""
    ends = np.arange(1, len(nats) + 1)
    return [[end, bits] for _, end, bits in bin_by_position(nats, ends)]


def _choose_prime(maker: ModelMaker, text: Text) -> ByteStream | None:
    """Return what a model reads before what it is judged on, if anything."""
    if not maker.entry.carried_automaton:
        return None
    return text.cut_prime(maker.comparison.text.prime_bytes)


def _build_cell(
    name: str,
    maker: ModelMaker,
    text: Text,
    learning_rate: float,
    *,
    steps: int | None,
    minutes: float,
    eval_bytes: int,
    judge: Callable[[PreTrainedModel], dict[str, Any]],
) -> Cell:
    """Return a cell that trains on text; windows and their order are the same for every model."""
    comparison = maker.comparison
    asked = _ask(maker, learning_rate) | {
        "corpus": text.slug,
        "sha256": text.corpus.sha256,
        "window_tokens": comparison.text.window_tokens,
        "steps": steps,
        "minutes": minutes,
        "eval_bytes": eval_bytes,
    }
    if maker.entry.carried_automaton:
        asked |= {"carried_automaton": True, "prime_bytes": comparison.text.prime_bytes}

    def cut_windows(number: int) -> WindowDataset:
        return WindowDataset(
            text.corpus.train,
            comparison.text.window_tokens,
            number,
            comparison.seed,
            matches=text.match_training_text(maker.automaton_window)
            if maker.entry.carried_automaton
            else None,
        )

    return Cell(
        name=name,
        asked=asked,
        build=maker.build_for_text,
        make_dataset=cut_windows,
        train=replace(comparison.train, learning_rate=learning_rate, seed=comparison.seed),
        steps=steps,
        minutes=minutes,
        judge=judge,
    )


def _ask(maker: ModelMaker, learning_rate: float) -> dict[str, Any]:
    """Return what decides every cell of a model."""
    comparison = maker.comparison
    entry = dataclasses.asdict(maker.entry)
    del entry["carried_automaton"]  # Decides cells of text only.
    own = ("minutes", "steps", "learning_rate", "seed")
    return {
        "model": maker.name,
        "entry": entry,
        "size": dataclasses.asdict(maker.size),
        "num_layers": comparison.num_layers,
        "num_heads": comparison.num_heads,
        "seed": comparison.seed,
        "learning_rate": learning_rate,
        "train": {k: v for k, v in dataclasses.asdict(comparison.train).items() if k not in own},
    }


def _require_names(texts: dict[str, Text]) -> None:
    """Raise unless every corpus has a folder of its own."""
    seen: dict[str, str] = {}
    for spec, text in texts.items():
        if text.slug in seen:
            raise InputError(
                f"corpora {seen[text.slug]!r} and {spec!r} would share the name {text.slug!r}; "
                "rename one of the folders"
            )
        seen[text.slug] = spec
