"""One engine for every study: a cell is measured once, recorded, and never measured again.

A study lists its cells; ``run_cells`` measures those that are not recorded yet, in order. Where the
user stops it, the same study goes on later: finished cells are read back, and a cell that keeps
checkpoints continues from its last one.
"""

import contextlib
import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar, TypeVar

from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel, TrainerCallback

from unimatrix.errors import InputError
from unimatrix.studies.records import Record, find_change
from unimatrix.train.callbacks import StopOnSignal
from unimatrix.train.recipe import TrainSection
from unimatrix.train.run_folder import RECORD_FILE, read_record, write_record
from unimatrix.train.trainer import train_model

OnMetrics = Callable[[dict[str, float]], None]
Say = Callable[[str], None]
Watch = Callable[[], tuple[Sequence[TrainerCallback], OnMetrics | None]]


class StoppedError(Exception):
    """The user asked to stop in the cell that the message names; finished cells are recorded."""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """What a cell is measured with.

    Attributes:
        device: cpu, cuda or mps.
        callbacks, on_metrics: as in ``train_model``.
        say: called with a sentence on what happens.
        folder: of the cell; ``None`` where nothing is kept.
        record: what an interrupted attempt left; ``None`` where there was none.
        write: writes how far the cell is, and returns the record as it will be read back.
    """

    device: str = "cpu"
    callbacks: Sequence[TrainerCallback] = ()
    on_metrics: OnMetrics | None = None
    say: Say = lambda _: None
    folder: Path | None = None
    record: Record | None = None
    write: Callable[[Record], Record] = lambda record: record

    def train(
        self,
        model: PreTrainedModel,
        dataset: Dataset[dict[str, Tensor]],
        settings: TrainSection,
        out: Path | None = None,
    ) -> float:
        """Train a model in place and leave it on the device; return the seconds.

        Raises:
            StoppedError: if the user asked to stop.
        """
        trained = train_model(
            model,
            dataset,
            settings,
            out,
            callbacks=self.callbacks,
            device=self.device,
            on_metrics=self.on_metrics,
        )
        if trained.interrupted:
            raise StoppedError
        model.to(self.device)
        return round(trained.train_s, 3)


@dataclass(frozen=True, kw_only=True)
class StudyCell(ABC):
    """One measurement of a study.

    Attributes:
        name: tells it apart; its folder below the study's.
        settings: everything that decides its result, as JSON types; a record of other settings is
            refused. ``None`` compares nothing.
    """

    name: str
    settings: Record | None = None
    needed: ClassVar[tuple[str, ...]] = ()
    """Fields that its record must have besides the status."""
    scratch: ClassVar[tuple[str, ...]] = ()
    """Folders below its own that only an unfinished cell needs."""

    @abstractmethod
    def measure(self, attempt: Attempt) -> Record:
        """Return the whole record, with a status."""

    def is_finished(self, record: Record) -> bool:
        """Return whether nothing is left to do; a failure may be a result too."""
        return bool(record["status"] == "done")


Cell = TypeVar("Cell", bound=StudyCell)


class FolderStore:
    """A folder a cell, below that of the study, with its ``record.json``.

    Args:
        out: of the study, which the caller holds; ``None`` keeps nothing.
        records_only: keep nothing of a cell but its record; then an interrupted cell starts anew.
    """

    def __init__(self, out: Path | None, *, records_only: bool = False) -> None:
        self.out = out
        self.records_only = records_only

    def read(self, cell: StudyCell) -> Record | None:
        """Return the record of a cell; ``None`` if it was never begun.

        Raises:
            InputError: if it is damaged, or of other settings.
        """
        if self.out is None or not (self.out / cell.name / RECORD_FILE).is_file():
            return None
        path = self.out / cell.name
        needed = [*cell.needed, *([] if cell.settings is None else ["asked"])]
        record = read_record(path, f"delete {path} to run it again", "status", *needed)
        settings = json.loads(json.dumps(cell.settings))
        changed = None if settings is None else find_change(record["asked"], settings)
        if changed is not None:
            raise InputError(
                f"{path} was made with another {changed}; choose another --out, or delete it"
            )
        return record

    def write(self, cell: StudyCell, record: Record) -> Record:
        """Write a record, whole or not at all; return it as it will be read back."""
        if self.out is not None:
            write_record(self.out / cell.name, record)
        return self.read(cell) or json.loads(json.dumps(record))

    @contextlib.contextmanager
    def begin(self, cell: StudyCell) -> Iterator[Path | None]:
        """Yield the folder for what a cell writes; delete what is not kept, before and after."""
        if self.out is None:
            yield None
            return
        path = self.out / cell.name
        if self.records_only:
            shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True, exist_ok=True)
        try:
            yield path
        except (KeyboardInterrupt, StoppedError):
            if self.records_only:
                shutil.rmtree(path, ignore_errors=True)
            raise
        for part in path.iterdir():
            if part.is_dir() and (self.records_only or part.name in cell.scratch):
                shutil.rmtree(part, ignore_errors=True)
            elif self.records_only and part.name != RECORD_FILE:
                part.unlink()


class ListStore(FolderStore):
    """All cells in the list ``cells`` of one record, which is written after each of them.

    Args:
        out: folder of the record, which the caller holds; ``None`` keeps it in memory alone.
        study: the record to go on with; gets the cells.
        name_cell: returns the name of a cell in the list.
    """

    def __init__(self, out: Path | None, study: Record, name_cell: Callable[[Record], str]) -> None:
        super().__init__(None)
        self.file = out
        self.study = study
        self.cells = {name_cell(cell): cell for cell in study["cells"]}

    def read(self, cell: StudyCell) -> Record | None:
        """Return the cell of the list, if it is there."""
        return self.cells.get(cell.name)

    def write(self, cell: StudyCell, record: Record) -> Record:
        """Append a cell to the list and write the record of the study."""
        self.cells[cell.name] = record
        self.study["cells"].append(record)
        self.save()
        return record

    def save(self) -> None:
        """Write the record of the study."""
        if self.file is not None:
            write_record(self.file, self.study)


def run_cell(cell: StudyCell, store: FolderStore, attempt: Attempt | None = None) -> Record:
    """Return the record of a cell: read back, gone on with, or made.

    Args:
        cell: what to measure.
        store: holds its record.
        attempt: device, callbacks and listeners; the engine adds the rest.

    Raises:
        InputError: as in ``FolderStore.read``.
        StoppedError: if a callback ended its training.
    """
    record = store.read(cell)
    if record is not None and cell.is_finished(record):
        return record
    with store.begin(cell) as folder:
        begun, write = store.read(cell), partial(store.write, cell)
        whole = replace(attempt or Attempt(), folder=folder, record=begun, write=write)
        return store.write(cell, cell.measure(whole))


def run_cells(
    cells: Iterable[StudyCell],
    store: FolderStore,
    attempt: Attempt,
    *,
    records: dict[str, Record],
    num_cells: int | None = None,
    stop: StopOnSignal | None = None,
    watch: Watch = lambda: ((), None),
) -> dict[str, Record]:
    """Measure cells one after the other; return all records by the names of their cells.

    Args:
        cells: in order; a generator may make later cells of what ``records`` says of earlier ones.
        store, attempt: as in ``run_cell``.
        records: those that are there; every further one is added as soon as its cell is finished.
        num_cells: of the whole study; with it, a sentence a cell says how many are left.
        stop: ends the study after the present cell, and a training after the present step;
            ``None`` lets Ctrl-C end it at once.
        watch: called before each cell, for callbacks and a listener to the log of its training.

    Raises:
        InputError: as in ``FolderStore.read``.
        StoppedError: if the user stopped it.
    """
    for cell in cells:
        callbacks, on_metrics = watch()
        if stop is not None:
            callbacks = [*callbacks, stop]
        if num_cells is not None:
            attempt.say(f"{cell.name} ({num_cells - len(records)} left)")
        try:
            watched = replace(attempt, callbacks=callbacks, on_metrics=on_metrics)
            records[cell.name] = run_cell(cell, store, watched)
        except (KeyboardInterrupt, StoppedError):
            raise StoppedError(cell.name) from None
        if stop is not None and stop.requested:
            raise StoppedError(cell.name)
    return records


def split_finished(
    cells: Sequence[Cell], store: FolderStore
) -> tuple[dict[str, Record], list[Cell]]:
    """Return the records of the finished cells by name, and the cells that are not finished."""
    records: dict[str, Record] = {}
    for cell in cells:
        record = store.read(cell)
        if record is not None and cell.is_finished(record):
            records[cell.name] = record
    return records, [cell for cell in cells if cell.name not in records]
