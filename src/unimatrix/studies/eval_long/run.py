"""The long-context evaluation of one or several models, from a plan to a record that can go on."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from unimatrix.data import load_corpus
from unimatrix.data.byte_stream import ByteStream
from unimatrix.data.corpora import choose_split
from unimatrix.data.sources import find_standard_library
from unimatrix.errors import InputError, suggest
from unimatrix.evaluation.code_completion import measure_far_names, measure_lines
from unimatrix.evaluation.long_context import measure_positions, measure_task
from unimatrix.evaluation.readers import Reader, TooLongError, open_reader
from unimatrix.tasks.ruler import RULER_TASKS, build_task
from unimatrix.train.run_folder import (
    RECORD_FILE,
    describe_run,
    hash_config,
    hold_results,
    is_vacant,
    read_record,
    write_record,
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

Record = dict[str, Any]


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
            if name not in TASKS:
                raise InputError(
                    f"unknown task {name!r}; choose from {', '.join(TASKS)}.{suggest(name, TASKS)}"
                )
        for option, values in (
            ("task", self.tasks),
            ("length", self.lengths),
            ("model", self.models),
        ):
            if not values or len(set(values)) < len(values):
                found = ", ".join(map(str, values)) or "nothing"
                raise InputError(f"{option} names {found}; name at least one, and each once")
        if min(self.lengths) < 1 or self.num_examples < 1:
            raise InputError(
                f"lengths are {self.lengths} and examples {self.num_examples}; give at least 1"
            )
        if self.seed < 0:
            raise InputError(f"seed {self.seed} is negative; give 0 or more")


class Material(NamedTuple):
    """What is read.

    Attributes:
        text: of essays and of the book.
        essay: its bytes, [n] uint8, the first 16 MiB.
        sources: the test split of the standard library by relative path.
    """

    text: ByteStream
    essay: NDArray[np.uint8]
    sources: dict[str, bytes]


class CellKey(NamedTuple):
    """One measurement."""

    model: str
    task: str
    total_bytes: int


def run_long_context(
    plan: LongContextPlan,
    *,
    out: Path | None = None,
    device: str = "cpu",
    on_start: Callable[[str, int], None] = lambda _text, _total: None,
    on_example: Callable[[int], None] = lambda _done: None,
    on_cell: Callable[[Record], None] = lambda _cell: None,
) -> Record:
    """Measure every cell that is not in the record yet, and return the record.

    Args:
        plan: what to measure.
        out: folder of the record, which is brought up to date after every cell; ``None`` keeps it
            in mind alone.
        device: cpu, cuda or mps.
        on_start: called before each cell with what it is and how many units it has.
        on_example: called with the units of the cell done.
        on_cell: called with every cell, measured or read back.

    Raises:
        InputError: for an unusable plan, model, text or folder; nothing is written.
    """
    material = _open_material(plan)
    readers = {name: open_reader(name, device=device) for name in plan.models}
    labels = _label(plan.models)
    asked = {labels[name]: _ask(plan, reader.model, material) for name, reader in readers.items()}
    _open_record(plan, out, asked, device)
    with hold_results(out):
        # Once more: who held the folder before may have measured some.
        record = _open_record(plan, out, asked, device)
        record["models"] |= {labels[name]: _describe(reader) for name, reader in readers.items()}
        done = {_key(cell): cell for cell in record["cells"]}
        for name, reader in readers.items():
            for task, total_bytes in _list_cells(plan):
                key = CellKey(labels[name], task, total_bytes)
                cell = done.get(key)
                if cell is None:
                    on_start(
                        f"{key.model}  {task}  {total_bytes:,} bytes", _count_units(plan, task)
                    )
                    cell = {**key._asdict(), "asked": asked[key.model]}
                    cell |= _measure(plan, reader, material, key, on_example)
                    record["cells"].append(cell)
                    _keep(out, record)
                on_cell(cell)
        record["status"] = "done"
        _keep(out, record)
    return record


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


def _label(models: Sequence[str]) -> dict[str, str]:
    """Return a short name for each model: the last part of its path where that tells them apart."""
    short = [Path(name).name or name for name in models]
    return {
        name: label if short.count(label) == 1 else name
        for name, label in zip(models, short, strict=True)
    }


def _ask(plan: LongContextPlan, model: PreTrainedModel, material: Material) -> Record:
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
    plan: LongContextPlan, out: Path | None, asked: dict[str, Record], device: str
) -> Record:
    """Return the record to go on with, or a new one."""
    settings = {k: v for k, v in asdict(plan).items() if k != "models"}
    new = {
        "status": "running",
        "seed": plan.seed,
        **describe_run(device),
        "plan": json.loads(json.dumps(settings)),
        "models": {},
        "cells": [],
    }
    if out is None:
        return new
    file = out / RECORD_FILE
    if not file.is_file():
        if not is_vacant(out):
            raise InputError(f"{out} exists and holds no record; choose another --out")
        return new
    record: Record = read_record(out, "choose another --out", "models", "cells")
    try:
        found = {_key(cell): cell["asked"] for cell in record["cells"]}
        assert isinstance(record["models"], dict)
    except (KeyError, TypeError, AssertionError) as error:
        raise InputError(f"{file} is damaged ({error}); choose another --out") from error
    for key, before in found.items():
        now = asked.get(key.model, before)
        if now != before:
            changed = next(k for k in {**now, **before} if now.get(k) != before.get(k))
            raise InputError(
                f"{out} has {key.model} measured with another {changed}; choose another --out"
            )
    return record | {"status": "running", "plan": new["plan"]}


def _key(cell: Record) -> CellKey:
    return CellKey(cell["model"], cell["task"], cell["total_bytes"])


def _list_cells(plan: LongContextPlan) -> Iterator[tuple[str, int]]:
    """Yield task and length, short lengths first."""
    for total_bytes in sorted(plan.lengths):
        yield from ((task, total_bytes) for task in plan.tasks if task in RULER_TASKS)
    yield from ((task, max(plan.lengths)) for task in plan.tasks if task not in RULER_TASKS)


def _count_units(plan: LongContextPlan, task: str) -> int:
    if task == BOOK:
        return 1
    if task == CODE:
        return plan.num_examples * (_LINES_PER_EXAMPLE + _NAMES_PER_EXAMPLE)
    return plan.num_examples


def _measure(
    plan: LongContextPlan,
    reader: Reader,
    material: Material,
    key: CellKey,
    on_example: Callable[[int], None],
) -> Record:
    """Return status and results of a cell; what a model cannot read is not run, with the reason."""
    try:
        if key.task == BOOK:
            results = measure_positions(reader, material.text, key.total_bytes)
        elif key.task == CODE:
            results = _measure_code(plan, reader, material, key, on_example)
        else:
            task = build_task(key.task, key.total_bytes, material.essay)
            count = _Counter(on_example).add
            results = measure_task(reader, task, plan.num_examples, plan.seed, on_example=count)
    except (InputError, TooLongError) as error:
        return {"status": "not run", "reason": str(error), "results": None}
    return {"status": "done", "reason": None, "results": results}


def _measure_code(
    plan: LongContextPlan,
    reader: Reader,
    material: Material,
    key: CellKey,
    on_example: Callable[[int], None],
) -> Record:
    """Return what both measures of code completion found."""
    names = measure_far_names(
        reader,
        material.sources,
        plan.num_examples * _NAMES_PER_EXAMPLE,
        most_bytes=key.total_bytes,
        on_source=on_example,
    )
    lines = measure_lines(
        reader,
        material.sources,
        plan.num_examples * _LINES_PER_EXAMPLE,
        plan.seed,
        context_bytes=key.total_bytes,
        on_example=_Counter(on_example, names["examples"]).add,
    )
    return {"lines": lines, "names": names}


class _Counter:
    """Counts calls and tells the count.

    Args:
        tell: called with the count.
        start: where to count from.
    """

    def __init__(self, tell: Callable[[int], None], start: int = 0) -> None:
        self._tell = tell
        self._count = start

    def add(self) -> None:
        """Count one more."""
        self._count += 1
        self._tell(self._count)


def _keep(out: Path | None, record: Record) -> None:
    """Write the record, if anywhere."""
    if out is not None:
        write_record(out, record)
