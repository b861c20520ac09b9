"""The cells of a comparison: trials of learning rates, text, recall, and compressors."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from unimatrix.data import ByteStream, WindowDataset
from unimatrix.errors import InputError
from unimatrix.evaluation.byte_costs import ByteCosts, measure_byte_costs
from unimatrix.evaluation.compressors import list_missing_compressors, measure_compressors
from unimatrix.evaluation.footprint import measure_carried_bytes
from unimatrix.evaluation.long_context import bin_by_position
from unimatrix.evaluation.recall import measure_recall
from unimatrix.studies.compare.models import ModelMaker
from unimatrix.studies.compare.recipe import PER_CELL, Comparison, SweepSection, TextSection
from unimatrix.studies.compare.texts import Text
from unimatrix.studies.compare.trained_cell import TrainedCell
from unimatrix.studies.engine import Attempt, StudyCell
from unimatrix.studies.records import Record
from unimatrix.studies.seeds import TEST_SEED_OFFSET
from unimatrix.tasks import AssociativeRecall, RotatingDataset
from unimatrix.train.run_folder import describe_run

STATE_TOKENS = (1024, 65_536)
"""Lengths at which the bytes carried are counted."""
_TOKENS_PER_BATCH = 2**15
_MOST_PER_BATCH = 64


def list_trials(maker: ModelMaker, text: Text) -> Iterator[TrainedCell]:
    """Yield the cells in which a model tries the learning rates."""
    sweep = maker.comparison.sweep

    def judge(model: PreTrainedModel) -> dict[str, Any]:
        valid = _measure_costs(model, maker, text, text.corpus.valid, sweep.eval_bytes)
        return {"valid_bits_per_byte": valid.bits_per_byte, "valid_bytes": len(valid.nats)}

    for rate in sweep.learning_rates:
        name = f"sweep/{maker.name}/lr-{rate:g}"
        yield _train_on_text(name, maker, text, rate, sweep, sweep.steps, judge)


def choose_learning_rate(trials: Sequence[Record]) -> float:
    """Return the learning rate of the trial with the fewest bits; diverged trials do not count.

    Raises:
        InputError: if all diverged.
    """
    finished = [trial for trial in trials if trial["status"] == "done"]
    if not finished:
        raise InputError(
            f"{trials[0]['asked']['model']} diverged at every learning rate of the sweep; add a "
            "smaller one to sweep.learning_rates"
        )
    best = min(finished, key=lambda trial: trial["results"]["valid_bits_per_byte"])
    return float(best["asked"]["learning_rate"])


def build_text_cell(maker: ModelMaker, table: str, text: Text, learning_rate: float) -> TrainedCell:
    """Return a cell of a table of language modelling."""
    section = maker.comparison.text

    def judge(model: PreTrainedModel) -> dict[str, Any]:
        valid = _measure_costs(model, maker, text, text.corpus.valid, section.eval_bytes)
        prime = _choose_prime(maker, text)
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
            test = _measure_costs(model, maker, text, text.corpus.test, section.eval_bytes)
            results |= {"test_bits_per_byte": test.bits_per_byte, "test_bytes": len(test.nats)}
        return results

    name = f"{table}/{text.slug}/{maker.name}"
    steps = section.steps if table == "parameters" else None
    return _train_on_text(name, maker, text, learning_rate, section, steps, judge)


def build_recall_cell(maker: ModelMaker, learning_rate: float) -> TrainedCell:
    """Return the cell in which a model learns associative recall."""
    comparison, section = maker.comparison, maker.comparison.recall
    task = AssociativeRecall()
    return TrainedCell(
        name=f"recall/{maker.name}",
        settings=_describe_model(maker, learning_rate) | {"recall": dataclasses.asdict(section)},
        build=lambda: maker.build_for_recall(task),
        make_dataset=lambda number: RotatingDataset(
            (task,), comparison.seed, number, section.batch_size
        ),
        train=replace(
            comparison.train,
            batch_size=section.batch_size,
            learning_rate=learning_rate,
            seed=comparison.seed,
        ),
        steps=section.steps,
        minutes=section.minutes,
        judge=lambda model: _judge_recall(model, comparison, task),
    )


@dataclass(frozen=True, kw_only=True)
class CompressorCell(StudyCell):
    """What compressors make of the bytes that the models are judged on."""

    needed = ("missing",)

    text: Text
    section: TextSection

    @classmethod
    def build(cls, comparison: Comparison, text: Text) -> "CompressorCell":
        """Return the cell of a corpus."""
        section = comparison.text
        settings = {
            "corpus": text.slug,
            "sha256": text.corpus.sha256,
            "eval_bytes": section.eval_bytes,
            "prime_bytes": section.prime_bytes,
        }
        name = f"compressors/{text.slug}"
        return cls(name=name, settings=settings, text=text, section=section)

    def is_finished(self, record: Record) -> bool:
        """Return whether no further compressor has been installed since."""
        return bool(record["missing"] == list_missing_compressors())

    def measure(self, attempt: Attempt) -> Record:
        """Compress the start of each split, plain and after the training text."""
        corpus = self.text.corpus
        prime = self.text.cut_prime(self.section.prime_bytes)
        texts = {
            name: stream.read(0, min(len(stream), self.section.eval_bytes)).tobytes()
            for name, stream in {"valid": corpus.valid, "test": corpus.test}.items()
            if stream is not None
        }
        scores = measure_compressors(prime.read(0, len(prime)).tobytes(), texts)
        return {
            "status": "done",
            "asked": self.settings,
            "missing": list_missing_compressors(),
            **describe_run("cpu"),
            "results": {
                name: {split: score._asdict() for split, score in by_split.items()}
                for name, by_split in scores.items()
            },
        }


def average_by_position(nats: NDArray[np.float32]) -> list[list[float]]:
    """Return [end of the bin in bytes, mean bits per byte in it], bins doubling in length."""
    ends = np.arange(1, len(nats) + 1)
    return [[end, bits] for _, end, bits in bin_by_position(nats, ends)]


def _judge_recall(
    model: PreTrainedModel, comparison: Comparison, task: AssociativeRecall
) -> dict[str, Any]:
    """Return accuracies by bindings and by length; lengths beyond a position table are left out."""
    section, seed = comparison.recall, comparison.seed + TEST_SEED_OFFSET

    def measure(test: AssociativeRecall, num_examples: int) -> float:
        batch_size = min(_MOST_PER_BATCH, max(1, _TOKENS_PER_BATCH // test.window_tokens))
        return measure_recall(model, test, num_examples, seed, batch_size=batch_size)

    longest = task.window_tokens if model.config.model_type == "gpt2" else None
    return {
        "accuracy_by_pairs": {
            str(pairs): measure(AssociativeRecall(pairs), section.test_examples)
            for pairs in section.test_pairs
        },
        "accuracy_by_tokens": {
            str(length): measure(AssociativeRecall(window_tokens=length), section.length_examples)
            for length in section.test_tokens
            if longest is None or length <= longest
        },
    }


def _measure_costs(
    model: PreTrainedModel, maker: ModelMaker, text: Text, stream: ByteStream, limit_bytes: int
) -> ByteCosts:
    return measure_byte_costs(
        model,
        stream,
        window_tokens=maker.comparison.text.window_tokens,
        limit_bytes=limit_bytes,
        prime=_choose_prime(maker, text),
    )


def _choose_prime(maker: ModelMaker, text: Text) -> ByteStream | None:
    """Return what a model reads before what it is judged on, if anything."""
    if not maker.entry.carried_automaton:
        return None
    return text.cut_prime(maker.comparison.text.prime_bytes)


def _train_on_text(
    name: str,
    maker: ModelMaker,
    text: Text,
    learning_rate: float,
    budget: SweepSection | TextSection,
    steps: int | None,
    judge: Callable[[PreTrainedModel], dict[str, Any]],
) -> TrainedCell:
    """Return a cell that trains on text; windows and their order are the same for every model."""
    comparison, carries = maker.comparison, maker.entry.carried_automaton
    settings = _describe_model(maker, learning_rate) | {
        "corpus": text.slug,
        "sha256": text.corpus.sha256,
        "window_tokens": comparison.text.window_tokens,
        "steps": steps,
        "minutes": budget.minutes,
        "eval_bytes": budget.eval_bytes,
    }
    if carries:
        settings |= {"carried_automaton": True, "prime_bytes": comparison.text.prime_bytes}

    def cut_windows(number: int) -> WindowDataset:
        return WindowDataset(
            text.corpus.train,
            comparison.text.window_tokens,
            number,
            comparison.seed,
            matches=text.match_training_text(maker.automaton_window) if carries else None,
        )

    return TrainedCell(
        name=name,
        settings=settings,
        build=maker.build_for_text,
        make_dataset=cut_windows,
        train=replace(comparison.train, learning_rate=learning_rate, seed=comparison.seed),
        steps=steps,
        minutes=budget.minutes,
        judge=judge,
    )


def _describe_model(maker: ModelMaker, learning_rate: float) -> dict[str, Any]:
    """Return the settings that decide every cell of a model."""
    comparison = maker.comparison
    entry = dataclasses.asdict(maker.entry)
    del entry["carried_automaton"]  # Decides cells of text only.
    train = dataclasses.asdict(comparison.train)
    return {
        "model": maker.name,
        "entry": entry,
        "size": dataclasses.asdict(maker.size),
        "num_layers": comparison.num_layers,
        "num_heads": comparison.num_heads,
        "seed": comparison.seed,
        "learning_rate": learning_rate,
        "train": {key: value for key, value in train.items() if key not in PER_CELL},
    }
