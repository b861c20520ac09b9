"""Reports: self-contained HTML pages of tables and pictures, the pictures beside them as PNG."""

import base64
import html
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from unimatrix.errors import InputError
from unimatrix.reports.text import Table
from unimatrix.train.run_folder import write_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
body{font:17px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif;color:#222;background:#fff;
max-width:70rem;margin:2.5rem auto;padding:0 1.5rem}
h1{font-size:2.1rem;line-height:1.2;margin-bottom:.4rem}h2{font-size:1.5rem;margin-top:3rem;
border-top:1px solid #ddd;padding-top:1.5rem}h3{font-size:1.1rem;margin:2rem 0 .5rem}
.lede{font-size:1.15rem;color:#444;max-width:48rem}.note{color:#555;max-width:48rem;font-size:.92rem}
figure{margin:1.5rem 0}img{max-width:100%;height:auto}
table{border-collapse:collapse;margin:.6rem 0 1.2rem;font-variant-numeric:tabular-nums}
th,td{padding:.35rem .9rem;text-align:right;border-bottom:1px solid #e4e4e4}
th:first-child,td:first-child{text-align:left}thead th{border-bottom:2px solid #888;font-weight:600}
td.ours{font-weight:700;color:#9c4400}td.wins{background:#fff0c2}
tr.total td{font-weight:700;border-top:2px solid #888}
.tables{display:flex;flex-wrap:wrap;gap:0 3rem;align-items:flex-start}
details{margin:.4rem 0}code{font-size:.85rem;overflow-wrap:anywhere}
"""


class Page:
    """A report in the making; nothing is written before ``write``.

    Args:
        path: of the HTML file; missing folders are made.
        title: of the window and above the page, as text.
        lede: what the page is about, as HTML.
        window_title: of the window, where it differs.

    Raises:
        InputError: if no report can go there.
    """

    def __init__(self, path: Path, title: str, lede: str, *, window_title: str = "") -> None:
        require_report_path(path)
        self.path = path
        self.title = window_title or title
        self.body = [f"<h1>{title}</h1>", f'<p class="lede">{lede}</p>']
        self.pictures: dict[str, bytes] = {}

    def add(self, *parts: str) -> None:
        """Add parts of HTML, in order."""
        self.body += parts

    def add_section(self, title: str, note: str, table: Table) -> None:
        """Add a heading, a note and a table, all of them as text or HTML; nothing without rows."""
        if table.rows:
            self.add(f"<h2>{title}</h2>", render_note(note), render_table(*table))

    def add_picture(self, name: str | None, figure: "Figure", text: str) -> None:
        """Add a figure, in the page and as a file of its own.

        Args:
            name: what follows the page's stem in the name of the file; ``None`` writes no file.
            figure: becomes a PNG.
            text: what a reader hears who cannot see it, as HTML.
        """
        # Loaded here: whoever writes no report does not wait for matplotlib.
        from unimatrix.reports.figures import render_png

        png = render_png(figure)
        self.pictures |= {} if name is None else {name: png}
        image = base64.b64encode(png).decode("ascii")
        self.add(f'<figure><img alt="{text}" src="data:image/png;base64,{image}"></figure>')

    def write(self) -> None:
        """Write the page, and its pictures beside it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for name, png in self.pictures.items():
            write_file(self.path.with_name(f"{self.path.stem}{name}.png"), png)
        head = (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{html.escape(self.title)}</title>\n<style>{_STYLE}</style>\n</head>"
        )
        write_file(self.path, "\n".join([head, "<body>", *self.body, "</body>", "</html>", ""]))


def require_report_path(path: Path) -> None:
    """Raise ``InputError`` unless a report can go there: a file ending in .html, in a folder.

    Args:
        path: of the HTML file; missing folders are no hindrance, and nothing is made.
    """
    if path.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"the report's path is {str(path)!r}; give it a name ending in .html")
    if path.is_dir():
        raise InputError(f"the report's path {str(path)!r} is a folder; give it another name")
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"the report cannot go into {str(parent)!r}; give it another folder")


def render_note(text: str) -> str:
    """Return a paragraph of HTML in small print."""
    return f'<p class="note">{text}</p>'


def render_table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    classes: Sequence[Sequence[str]] = (),
    last_is_total: bool = False,
) -> str:
    """Return an HTML table with every cell escaped.

    Args:
        header: one text a column.
        rows: one text a cell.
        classes: the style class of each cell, ``""`` for none; empty styles no cell.
        last_is_total: set the last row apart.
    """
    lines = ["<table><thead><tr>"]
    lines += [f"<th>{html.escape(text)}</th>" for text in header]
    lines.append("</tr></thead><tbody>")
    for index, row in enumerate(rows):
        is_total = last_is_total and index == len(rows) - 1
        lines.append('<tr class="total">' if is_total else "<tr>")
        names = classes[index] if classes else [""] * len(row)
        for text, name in zip(row, names, strict=True):
            style = f' class="{name}"' if name else ""
            lines.append(f"<td{style}>{html.escape(text)}</td>")
        lines.append("</tr>")
    return "".join([*lines, "</tbody></table>"])
