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
from dataclasses import dataclass
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
from unimatrix.train.trainer import TrainResult, train_model

OnMetrics = Callable[[dict[str, float]], None]
Say = Callable[[str], None]
Watch = Callable[[], tuple[Sequence[TrainerCallback], OnMetrics | None]]


class StoppedError(Exception):
    """The user asked to stop in the cell that the message names; finished cells are recorded."""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """What a cell is measured with.

    Attributes:
        folder: of the cell; ``None`` where nothing but the record is kept, or nothing at all.
        record: what an interrupted attempt left; ``None`` where there was none.
        write: writes how far the cell is, and returns the record as it will be read back.
        device: cpu, cuda or mps.
        callbacks, on_metrics: as in ``train_model``.
        say: called with a sentence on what happens.
    """

    folder: Path | None
    record: Record | None
    write: Callable[[Record], Record]
    device: str
    callbacks: Sequence[TrainerCallback]
    on_metrics: OnMetrics | None
    say: Say

    def train(
        self,
        model: PreTrainedModel,
        dataset: Dataset[dict[str, Tensor]],
        settings: TrainSection,
        out: Path | None = None,
        *,
        checkpoint: Path | None = None,
    ) -> TrainResult:
        """Train a model in place, as ``train_model`` does; a stop asked for ends it early."""
        return train_model(
            model,
            dataset,
            settings,
            out,
            checkpoint=checkpoint,
            callbacks=self.callbacks,
            device=self.device,
            on_metrics=self.on_metrics,
        )

    def train_to_end(
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
        trained = self.train(model, dataset, settings, out)
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


class Store(ABC):
    """Where the records of a study's cells lie."""

    @abstractmethod
    def read(self, cell: StudyCell) -> Record | None:
        """Return the record of a cell; ``None`` if it was never begun.

        Raises:
            InputError: if it is damaged, or of other settings.
        """

    @abstractmethod
    def write(self, cell: StudyCell, record: Record) -> Record:
        """Write a record, whole or not at all; return it as it will be read back."""

    @contextlib.contextmanager
    def attempt(self, cell: StudyCell) -> Iterator[Path | None]:
        """Yield the folder for what an attempt writes besides the record, if it may write any."""
        yield None


class FolderStore(Store):
    """A folder a cell, below that of the study, with its ``record.json``.

    Args:
        out: of the study, which the caller holds; ``None`` keeps nothing.
        records_only: keep nothing of a cell but its record; then an interrupted cell starts anew.
    """

    def __init__(self, out: Path | None, *, records_only: bool = False) -> None:
        self.out = out
        self.records_only = records_only

    def read(self, cell: StudyCell) -> Record | None:
        """Return the record in the cell's folder; see ``Store``."""
        if self.out is None or not (self.out / cell.name / RECORD_FILE).is_file():
            return None
        path = self.out / cell.name
        needed = ("status", *cell.needed) if cell.settings is None else ("status", "asked")
        record = read_record(path, f"delete {path} to run it again", *needed, *cell.needed)
        if cell.settings is not None:
            changed = find_change(record["asked"], json.loads(json.dumps(cell.settings)))
            if changed is not None:
                raise InputError(
                    f"{path} was made with another {changed}; choose another --out, or delete it"
                )
        return record

    def write(self, cell: StudyCell, record: Record) -> Record:
        """Write the record into the cell's folder; see ``Store``."""
        if self.out is None:
            written: Record = json.loads(json.dumps(record))
            return written
        write_record(self.out / cell.name, record)
        return read_record(self.out / cell.name, "run it again")

    @contextlib.contextmanager
    def attempt(self, cell: StudyCell) -> Iterator[Path | None]:
        """Yield the cell's folder; delete what is not to be kept, before and after."""
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


class ListStore(Store):
    """All cells in the list ``cells`` of one record, which is written after each of them.

    Args:
        out: folder of the record, which the caller holds; ``None`` keeps it in memory alone.
        record: to go on with; gets the cells.
        name_cell: returns the name of a cell in the list.
    """

    def __init__(
        self, out: Path | None, record: Record, name_cell: Callable[[Record], str]
    ) -> None:
        self.out = out
        self.record = record
        self._cells = {name_cell(cell): cell for cell in record["cells"]}

    def read(self, cell: StudyCell) -> Record | None:
        """Return the cell of the list; see ``Store``."""
        return self._cells.get(cell.name)

    def write(self, cell: StudyCell, record: Record) -> Record:
        """Append the cell to the list; see ``Store``."""
        self._cells[cell.name] = record
        self.record["cells"].append(record)
        self.save()
        return record

    def save(self) -> None:
        """Write the record of the study."""
        if self.out is not None:
            write_record(self.out, self.record)


def run_cell(
    cell: StudyCell,
    store: Store,
    *,
    device: str = "cpu",
    callbacks: Sequence[TrainerCallback] = (),
    on_metrics: OnMetrics | None = None,
    say: Say = lambda _: None,
) -> Record:
    """Return the record of a cell: read back, gone on with, or made.

    Args:
        cell: what to measure.
        store: of its record.
        device: cpu, cuda or mps.
        callbacks, on_metrics: as in ``train_model``.
        say: called with a sentence on what happens.

    Raises:
        InputError: as in ``Store.read``.
        StoppedError: if a callback ended its training.
    """
    record = store.read(cell)
    if record is not None and cell.is_finished(record):
        return record
    with store.attempt(cell) as folder:
        attempt = Attempt(
            folder=folder,
            record=store.read(cell),
            write=partial(store.write, cell),
            device=device,
            callbacks=callbacks,
            on_metrics=on_metrics,
            say=say,
        )
        return store.write(cell, cell.measure(attempt))


def split_finished(cells: Iterable[Cell], store: Store) -> tuple[dict[str, Record], list[Cell]]:
    """Return the records of the finished cells by name, and the cells that are not finished.

    Raises:
        InputError: as in ``Store.read``.
    """
    records: dict[str, Record] = {}
    missing = []
    for cell in cells:
        record = store.read(cell)
        if record is not None and cell.is_finished(record):
            records[cell.name] = record
        else:
            missing.append(cell)
    return records, missing


def run_cells(
    cells: Iterable[StudyCell],
    store: Store,
    *,
    records: dict[str, Record],
    num_cells: int | None = None,
    stop: StopOnSignal | None = None,
    device: str = "cpu",
    say: Say = lambda _: None,
    watch: Watch = lambda: ((), None),
) -> dict[str, Record]:
    """Measure cells one after the other; return all records by the names of their cells.

    Args:
        cells: in order; a generator may make later cells of what ``records`` says of earlier ones.
        store: of their records.
        records: those that are there; gets every further one as soon as its cell is finished.
        num_cells: of the whole study; with it, a sentence a cell says how many are left.
        stop: ends the study after the present cell, and a training after the present step;
            ``None`` lets Ctrl-C end it at once.
        device: cpu, cuda or mps.
        say: called with a sentence on what happens.
        watch: called before each cell, for callbacks and a listener to the log of its training.

    Raises:
        InputError: as in ``Store.read``.
        StoppedError: if the user stopped it.
    """
    for cell in cells:
        callbacks, on_metrics = watch()
        if num_cells is not None:
            say(f"{cell.name} ({num_cells - len(records)} left)")
        try:
            records[cell.name] = run_cell(
                cell,
                store,
                device=device,
                callbacks=[*callbacks, *([] if stop is None else [stop])],
                on_metrics=on_metrics,
                say=say,
            )
        except (KeyboardInterrupt, StoppedError):
            raise StoppedError(cell.name) from None
        if stop is not None and stop.requested:
            raise StoppedError(cell.name)
    return records
