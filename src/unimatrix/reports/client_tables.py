"""The table of what works with which library, from the recorded tests of ``tests/clients``."""

from collections.abc import Mapping
from typing import Any

from unimatrix.reports.text import Table, tabulate


def tabulate_clients(record: Mapping[str, Any]) -> Table:
    """Return a row for every use that a test shows, each library and version named once.

    Args:
        record: of ``results/clients``.
    """
    versions = {name.replace("_", "-"): version for name, version in record["versions"].items()}
    rows = []
    named: set[str] = set()
    for use in sorted(
        record["results"]["uses"], key=lambda use: (use["library"].lower(), use["use"])
    ):
        library = {"library": use["library"], "version": versions[use["library"].lower()]}
        row = library if use["library"] not in named else {}
        named.add(use["library"])
        reason = "" if use["sentence"] is None else f": {use['sentence']}"
        rows.append({**row, "use": use["use"], "result": f"{use['outcome']}{reason}"})
    return tabulate(rows)
