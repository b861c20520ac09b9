"""The long-context evaluation of one or several models, from a plan to a record that can go on."""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from unimatrix.data import load_corpus
from unimatrix.data.byte_stream import ByteStream
from unimatrix.data.corpora import choose_split
from unimatrix.data.sources import find_standard_library
from unimatrix.errors import InputError, require_choice
from unimatrix.evaluation.code_completion import measure_far_names, measure_lines
from unimatrix.evaluation.long_context import measure_positions, measure_task
from unimatrix.evaluation.readers import Reader, TooLongError, open_reader
from unimatrix.studies.engine import Attempt, ListStore, StudyCell, run_cells
from unimatrix.studies.records import Record, find_change
from unimatrix.tasks.ruler import RULER_TASKS, build_task
from unimatrix.train.run_folder import (
    RECORD_FILE,
    describe_run,
    hash_config,
    hold_results,
    is_vacant,
    read_record,
)

BOOK, CODE = "book", "code"
TASKS = (*RULER_TASKS, BOOK, CODE)
"""What can be asked of a model: RULER's tasks, a text by position, code completion."""
LENGTHS = (1024, 4096, 16_384, 65_536, 262_144, 1_048_576)
DEFAULT_TEXT = "pystdlib"
"""What essays are cut from and the book is, where nobody names another: its test split."""
_LINES_PER_EXAMPLE = 10
_NAMES_PER_EXAMPLE = 100
_MOST_ESSAY_BYTES = 2**24
# What differs between two saved copies of the same model.
_IDLE_FIELDS = ("_name_or_path", "transformers_version")


@dataclass(frozen=True, kw_only=True)
class LongContextPlan:
    """What to measure.

    Raises:
        InputError: an unknown task, or a number out of range.
    """

    models: tuple[str, ...]
    """Run folders, saved models or names on the Hugging Face hub."""
    tasks: tuple[str, ...] = TASKS
    """Names of ``TASKS``."""
    lengths: tuple[int, ...] = LENGTHS
    """Bytes of prompt and answer; book and code read as far as the longest."""
    num_examples: int = 10
    """Examples of each of RULER's tasks at each length; ten lines and a hundred names each."""
    seed: int = 0
    """Of everything random."""
    data: tuple[str, ...] = (DEFAULT_TEXT,)
    """The text of essays and of the book: a corpus's test split, or all bytes of files."""

    def __post_init__(self) -> None:
        for name in self.tasks:
            require_choice("unknown task", name, TASKS)
        named = {"task": self.tasks, "length": self.lengths, "model": self.models}
        for option, values in named.items():
            if not values or len(set(values)) < len(values):
                names = ", ".join(map(str, values)) or "nothing"
                raise InputError(f"{option} names {names}; name at least one, and each once")
        if min(self.lengths) < 1 or self.num_examples < 1:
            raise InputError(
                f"lengths are {self.lengths} and examples {self.num_examples}; give at least 1"
            )
        if self.seed < 0:
            raise InputError(f"seed {self.seed} is negative; give 0 or more")


class Material(NamedTuple):
    """What the models read.

    Attributes:
        text: of essays and of the book.
        essay: its bytes, [n] uint8, the first 16 MiB.
        sources: the test split of the standard library by relative path.
    """

    text: ByteStream
    essay: NDArray[np.uint8]
    sources: dict[str, bytes]


@dataclass(frozen=True, kw_only=True)
class LongContextCell(StudyCell):
    """One task at one length, asked of one model.

    Attributes:
        reader: the model.
        model: what the record calls it.
        task: a name of ``TASKS``.
        total_bytes: of prompt and answer.
        plan, material: of the evaluation.
        on_start, on_example: as in ``run_long_context``.
    """

    reader: Reader
    model: str
    task: str
    total_bytes: int
    plan: LongContextPlan
    material: Material
    on_start: Callable[[str, int], None]
    on_example: Callable[[int], None]

    def is_finished(self, record: Record) -> bool:
        """Return True: a cell is recorded when it is measured, and a refusal is a result."""
        return True

    def measure(self, attempt: Attempt) -> Record:
        """Return results; what a model cannot read is not run, with the reason."""
        place = {"model": self.model, "task": self.task, "total_bytes": self.total_bytes}
        measure = {BOOK: self._measure_book, CODE: self._measure_code}.get(self.task, self._measure)
        units = {BOOK: 1, CODE: self.plan.num_examples * (_LINES_PER_EXAMPLE + _NAMES_PER_EXAMPLE)}
        self.on_start(
            f"{self.model}  {self.task}  {self.total_bytes:,} bytes",
            units.get(self.task, self.plan.num_examples),
        )
        try:
            outcome = {"status": "done", "reason": None, "results": measure()}
        except (InputError, TooLongError) as error:
            outcome = {"status": "not run", "reason": str(error), "results": None}
        return {**place, "asked": self.settings, **outcome}

    def _count_from(self, first: int) -> Callable[[], None]:
        """Return what tells of one more unit done, each time that it is called."""
        numbers = itertools.count(first)
        return lambda: self.on_example(next(numbers))

    def _measure(self) -> Record:
        """Return what the model makes of one of RULER's tasks."""
        task = build_task(self.task, self.total_bytes, self.material.essay)
        num_examples, seed = self.plan.num_examples, self.plan.seed
        return measure_task(self.reader, task, num_examples, seed, on_example=self._count_from(1))

    def _measure_book(self) -> Record:
        return measure_positions(self.reader, self.material.text, self.total_bytes)

    def _measure_code(self) -> Record:
        """Return what both measures of code completion find."""
        reader, sources, length = self.reader, self.material.sources, self.total_bytes
        num_names = self.plan.num_examples * _NAMES_PER_EXAMPLE
        num_lines = self.plan.num_examples * _LINES_PER_EXAMPLE
        names = measure_far_names(
            reader, sources, num_names, most_bytes=length, on_source=self.on_example
        )
        count, seed = self._count_from(names["examples"] + 1), self.plan.seed
        lines = measure_lines(
            reader, sources, num_lines, seed, context_bytes=length, on_example=count
        )
        return {"lines": lines, "names": names}


def run_long_context(
    plan: LongContextPlan,
    *,
    out: Path | None = None,
    device: str = "cpu",
    on_start: Callable[[str, int], None] = lambda _text, _total: None,
    on_example: Callable[[int], None] = lambda _done: None,
) -> Record:
    """Measure every cell that is not in the record yet, and return the record.

    Args:
        plan: what to measure.
        out: folder of the record, which is brought up to date after every cell; ``None`` keeps it
            in memory alone.
        device: cpu, cuda or mps.
        on_start: called before each cell with what it is and how many units it has.
        on_example: called with how many units of the cell are done.

    Raises:
        InputError: for an unusable plan, model, text or folder; nothing is written.
        StoppedError: by Ctrl-C; what was measured is recorded.
    """
    material = _open_material(plan)
    readers = {label: open_reader(name, device=device) for name, label in _label(plan.models)}
    settings = {
        label: _describe_settings(plan, reader.model, material) for label, reader in readers.items()
    }
    build = partial(
        LongContextCell, plan=plan, material=material, on_start=on_start, on_example=on_example
    )
    cells = [
        build(
            name=f"{model}/{task}/{total_bytes}",
            settings=settings[model],
            reader=reader,
            model=model,
            task=task,
            total_bytes=total_bytes,
        )
        for model, reader in readers.items()
        for task, total_bytes in _list_tasks(plan)
    ]
    _open_record(plan, out, settings, device)
    with hold_results(out):
        # Once more: who held the folder before may have measured some.
        store = ListStore(out, _open_record(plan, out, settings, device), _name_cell)
        store.study["models"] |= {label: _describe(reader) for label, reader in readers.items()}
        run_cells(cells, store, Attempt(device=device), records={})
        store.study["status"] = "done"
        store.save()
    return store.study


def _open_material(plan: LongContextPlan) -> Material:
    """Open the text and the sources, as far as the tasks need them."""
    specs = list(plan.data)
    corpus = load_corpus(specs, specs)
    text = corpus.valid if corpus.test is None else corpus.test
    essay = text.read(0, min(len(text), _MOST_ESSAY_BYTES))
    sources = {
        name: path.read_bytes()
        for name, path in (find_standard_library() if CODE in plan.tasks else {}).items()
        if choose_split(name) == "test"
    }
    return Material(text, essay, sources)


def _label(models: Sequence[str]) -> list[tuple[str, str]]:
    """Return each model with a short name: the last part of its path where none shares it."""
    short = [Path(name).name or name for name in models]
    return [
        (name, label if short.count(label) == 1 else name)
        for name, label in zip(models, short, strict=True)
    ]


def _describe_settings(plan: LongContextPlan, model: PreTrainedModel, material: Material) -> Record:
    """Return what decides the results of a model besides task and length."""
    fields = {k: v for k, v in model.config.to_dict().items() if k not in _IDLE_FIELDS}
    return {
        "examples": plan.num_examples,
        "seed": plan.seed,
        "text_sha256": material.text.sha256(_MOST_ESSAY_BYTES),
        "config_sha256": hash_config(json.loads(json.dumps(fields, default=str))),
        "weights_sha256": _hash_weights(model),
    }


def _hash_weights(model: PreTrainedModel) -> str:
    """Return the SHA-256 of all parameters and buffers that are saved."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _describe(reader: Reader) -> Record:
    return {
        "name": reader.name,
        "type": reader.model.config.model_type,
        "parameters": reader.model.num_parameters(),
        "reads": "bytes" if reader.tokenizer is None else "tokens",
        "limit_tokens": reader.limit_tokens,
    }


def _open_record(
    plan: LongContextPlan, out: Path | None, settings: Mapping[str, Record], device: str
) -> Record:
    """Return the record to go on with, or a new one.

    Raises:
        InputError: for a folder without a record, or one that is damaged or of other settings.
    """
    plan_fields = {k: v for k, v in asdict(plan).items() if k != "models"}
    new = {
        "status": "running",
        "seed": plan.seed,
        **describe_run(device),
        "plan": json.loads(json.dumps(plan_fields)),
        "models": {},
        "cells": [],
    }
    if out is None or is_vacant(out):
        return new
    if not (out / RECORD_FILE).is_file():
        raise InputError(f"{out} exists and holds no record; choose another --out")
    record: Record = read_record(out, "choose another --out", "models", "cells")
    try:
        measured = {_name_cell(cell): (cell["model"], cell["asked"]) for cell in record["cells"]}
        assert isinstance(record["models"], dict)
    except (KeyError, TypeError, AssertionError) as error:
        raise InputError(
            f"{out / RECORD_FILE} is damaged ({error}); choose another --out"
        ) from error
    for model, before in measured.values():
        changed = find_change(before, settings.get(model, before))
        if changed is not None:
            raise InputError(
                f"{out} has {model} measured with another {changed}; choose another --out"
            )
    return record | {"status": "running", "plan": new["plan"]}


def _name_cell(cell: Record) -> str:
    return f"{cell['model']}/{cell['task']}/{cell['total_bytes']}"


def _list_tasks(plan: LongContextPlan) -> Iterator[tuple[str, int]]:
    """Yield task and length, short lengths first."""
    for total_bytes in sorted(plan.lengths):
        yield from ((task, total_bytes) for task in plan.tasks if task in RULER_TASKS)
    yield from ((task, max(plan.lengths)) for task in plan.tasks if task not in RULER_TASKS)
