"""Tables of what works with which library, from the recorded tests of ``tests/clients``."""

from collections.abc import Mapping, Sequence
from typing import Any

HEADER = ("library", "version", "use", "result")


def tabulate_clients(record: Mapping[str, Any]) -> list[list[str]]:
    """Return a row for every use that a test shows, in order of library and use.

    Args:
        record: of ``results/clients``.
    """
    versions = {name.replace("_", "-"): version for name, version in record["versions"].items()}
    rows = []
    for use in sorted(
        record["results"]["uses"], key=lambda use: (use["library"].lower(), use["use"])
    ):
        version = versions[use["library"].lower()]
        said = "" if use["sentence"] is None else f": {use['sentence']}"
        rows.append([use["library"], version, use["use"], f"{use['outcome']}{said}"])
    return _leave_out_repeated(rows)


def _leave_out_repeated(rows: Sequence[list[str]]) -> list[list[str]]:
    """Return the rows with library and version said once each."""
    shown, before = [], ["", ""]
    for row in rows:
        shown.append(["", "", *row[2:]] if row[:2] == before else row)
        before = row[:2]
    return shown
