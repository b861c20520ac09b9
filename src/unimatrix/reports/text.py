"""Tables and figures as text: what terminal, documents and pages share."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple


class Table(NamedTuple):
    """A table of texts.

    Attributes:
        header: one a column.
        rows: one a cell.
    """

    header: list[str]
    rows: list[list[str]]

    def select(self, names: Sequence[str]) -> "Table":
        """Return columns by their names, in the order of the names; empty where there is none."""
        rows = [dict(zip(self.header, row, strict=True)) for row in self.rows]
        return Table(list(names), [[row.get(name, "") for name in names] for row in rows])


def tabulate(rows: Iterable[Mapping[str, str]]) -> Table:
    """Return the table of rows that name their cells: a column a name, in the order first met."""
    rows = list(rows)
    header = list(dict.fromkeys(name for row in rows for name in row))
    return Table(header, [[row.get(name, "") for name in header] for row in rows])


def join(parts: Iterable[tuple[Mapping[str, str], Table]]) -> Table:
    """Return the rows of several tables below each other, each with cells of its own in front."""
    return tabulate(
        {**front, **dict(zip(table.header, row, strict=True))}
        for front, table in parts
        for row in table.rows
    )


def format_markdown(table: Table, nothing: str = "Nothing is recorded yet.") -> str:
    """Return a table as Markdown, or a sentence where it has no row."""
    lines = [table.header, ["---"] * len(table.header), *table.rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) if table.rows else nothing


def format_percent(fraction: float | None, digits: int = 1) -> str:
    """Return per cent; what is not 1 is never shown as 100, and ``None`` is nothing."""
    if fraction is None:
        return ""
    text = f"{100 * fraction:.{digits}f}"
    return text if fraction >= 1 or float(text) < 100 else f"> {100 - 10**-digits:.{digits}f}"
