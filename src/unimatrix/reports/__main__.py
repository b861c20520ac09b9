"""``python -m unimatrix.reports [--check]``: make the tables of the documents from the records.

Run it in the root of a checkout. ``--check`` changes nothing and fails if a document differs.
"""

import argparse
import sys
from pathlib import Path

from unimatrix.reports.tables import read_records, render_document

DOCUMENTS = ("README.md", "docs/results.md", "docs/hindsight.md")


def main() -> int:
    """Return 0, or 1 if ``--check`` found a document that differs from the records."""
    parser = argparse.ArgumentParser(prog="python -m unimatrix.reports", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail on a difference")
    check = parser.parse_args().check
    records = read_records(Path("results"))
    stale = []
    for document in map(Path, DOCUMENTS):
        text = document.read_text(encoding="utf-8")
        rendered = render_document(text, records)
        if rendered != text:
            stale.append(str(document))
            if not check:
                document.write_text(rendered, encoding="utf-8")
    if check and stale:
        sys.stderr.write(f"differs from the records: {', '.join(stale)}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
