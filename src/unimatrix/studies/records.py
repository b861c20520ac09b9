"""Records of studies, read back by folder; loads neither torch nor transformers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unimatrix.errors import InputError
from unimatrix.train.run_folder import RECORD_FILE, read_record

Record = dict[str, Any]
Records = Mapping[str, Record]


def read_records(folder: Path) -> dict[str, Record]:
    """Return every record below a folder by the path of its own folder.

    Raises:
        InputError: if there is none, or one is damaged.
    """
    records = {
        path.parent.relative_to(folder).as_posix(): read_record(path.parent, "make it again")
        for path in sorted(folder.rglob(RECORD_FILE))
    }
    if not records:
        raise InputError(f"{folder} holds no record.json; run the commands in results/README.md")
    return records


def select_records(records: Records, prefix: str) -> dict[str, Record]:
    """Return the records whose name starts with ``prefix``, by the rest of their name."""
    return {
        name.removeprefix(prefix): record
        for name, record in records.items()
        if name.startswith(prefix)
    }


def find_change(before: Record, now: Record) -> str | None:
    """Return the name of the first setting in which two differ, if there is one."""
    return next((key for key in {**now, **before} if now.get(key) != before.get(key)), None)
