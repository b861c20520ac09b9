"""Cells are measured once, in order, and a stop loses nothing that was finished."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from unimatrix.errors import InputError
from unimatrix.studies.engine import (
    Attempt,
    FolderStore,
    ListStore,
    StoppedError,
    StudyCell,
    run_cell,
    run_cells,
)
from unimatrix.studies.records import Record, read_records, select_records
from unimatrix.train.callbacks import StopOnSignal


@dataclass(frozen=True, kw_only=True)
class Sum(StudyCell):
    """A cell that writes a file and a folder, then returns a number."""

    scratch = ("scratch",)
    number: int
    end: Callable[[], None] = lambda: None

    def measure(self, attempt: Attempt) -> Record:
        before = 0 if attempt.record is None else attempt.record["sum"]
        if attempt.folder is not None:
            (attempt.folder / "scratch").mkdir(exist_ok=True)
            (attempt.folder / "weights").write_text("1")
        asked = {} if self.settings is None else {"asked": self.settings}
        partial = attempt.write({"status": "begun", **asked, "sum": before + self.number})
        self.end()
        return partial | {"status": "done"}


def interrupt() -> None:
    raise KeyboardInterrupt


def make(name: str, number: int = 1, end: Callable[[], None] = lambda: None) -> Sum:
    return Sum(name=name, number=number, end=end, settings={"number": number, "pair": (1, 2)})


def test_cells_run_in_order_and_once(tmp_path) -> None:
    said: list[str] = []
    store = FolderStore(tmp_path)
    cells = [make("a"), make("b/c", 2)]
    first = run_cells(cells, store, Attempt(say=said.append), records={}, num_cells=2)
    assert said == ["a (2 left)", "b/c (1 left)"]
    assert {name: record["sum"] for name, record in first.items()} == {"a": 1, "b/c": 2}
    again = [make("a", end=interrupt), make("b/c", 2, end=interrupt)]
    assert run_cells(again, store, Attempt(), records={}) == first == read_records(tmp_path)
    assert select_records(first, "b/") == {"c": first["b/c"]}
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["record.json", "weights"]


def test_a_later_cell_may_depend_on_an_earlier_record(tmp_path) -> None:
    records: dict[str, Record] = {}

    def list_cells() -> Iterator[Sum]:
        yield make("a", 3)
        yield make("b", records["a"]["sum"] + 1)

    run_cells(list_cells(), FolderStore(tmp_path), Attempt(), records=records)
    assert records["b"]["sum"] == 4


@pytest.mark.parametrize(("records_only", "total"), [(False, 2), (True, 1)])
def test_an_interrupted_cell_goes_on_or_starts_anew(tmp_path, records_only, total) -> None:
    store = FolderStore(tmp_path, records_only=records_only)
    with pytest.raises(StoppedError, match=r"^b$"):
        run_cells([make("a"), make("b", end=interrupt), make("c")], store, Attempt(), records={})
    assert (tmp_path / "b").exists() != records_only
    assert not (tmp_path / "c").exists()
    records = run_cells([make("a"), make("b"), make("c")], store, Attempt(), records={})
    assert {name: record["sum"] for name, record in records.items()} == {"a": 1, "b": total, "c": 1}
    left = {path.name for path in (tmp_path / "b").iterdir()}
    assert left == ({"record.json"} if records_only else {"record.json", "weights"})


def test_a_stop_asked_for_ends_the_study_after_the_cell(tmp_path) -> None:
    stop = StopOnSignal()

    def ask() -> None:
        stop.requested = True

    cells = [make("a", end=ask), make("b")]
    with pytest.raises(StoppedError, match=r"^a$"):
        run_cells(cells, FolderStore(tmp_path), Attempt(), records={}, stop=stop)
    assert json.loads((tmp_path / "a" / "record.json").read_text())["status"] == "done"
    assert not (tmp_path / "b").exists()


def test_records_of_other_settings_and_damaged_ones_are_refused(tmp_path) -> None:
    store = FolderStore(tmp_path)
    run_cell(make("a"), store)
    with pytest.raises(InputError, match="a was made with another number; choose another --out"):
        run_cell(make("a", 2), store)
    (tmp_path / "a" / "record.json").write_text('{"status": "done"}')
    with pytest.raises(InputError, match=r"record.json is damaged \('asked'\); delete"):
        run_cell(make("a"), store)
    with pytest.raises(InputError, match=r"holds no record\.json"):
        read_records(tmp_path / "nothing")


@dataclass(frozen=True, kw_only=True)
class Entry(StudyCell):
    """A cell of a list."""

    end: Callable[[], None] = lambda: None

    def measure(self, attempt: Attempt) -> Record:
        self.end()
        return {"key": self.name, "status": "done"}


def test_a_list_of_cells_is_one_record(tmp_path) -> None:
    def open_store() -> ListStore:
        path = tmp_path / "record.json"
        record = json.loads(path.read_text()) if path.is_file() else {"seed": 7, "cells": []}
        return ListStore(tmp_path, record, lambda cell: cell["key"])

    run_cells([Entry(name="1")], open_store(), Attempt(), records={})
    cells = [Entry(name="1", end=interrupt), Entry(name="2"), Entry(name="3", end=interrupt)]
    with pytest.raises(StoppedError, match=r"^3$"):
        run_cells(cells, open_store(), Attempt(), records={})
    record = json.loads((tmp_path / "record.json").read_text())
    assert (record["seed"], [cell["key"] for cell in record["cells"]]) == (7, ["1", "2"])


def test_nothing_is_kept_without_a_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    record = run_cell(make("a"), FolderStore(None))
    assert record["asked"] == {"number": 1, "pair": [1, 2]}
    assert not list(tmp_path.iterdir())
