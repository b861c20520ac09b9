"""``python -m unimatrix.reports [--check]``: make the tables of the documents from the records.

Run it in the root of a checkout. ``--check`` changes nothing and fails if a document differs.
"""

import argparse
import sys
from pathlib import Path

from unimatrix.reports.tables import find_stale_documents
from unimatrix.studies.records import read_records
from unimatrix.train.run_folder import write_file


def main() -> int:
    """Return 0, or 1 if ``--check`` found a document that differs from the records."""
    parser = argparse.ArgumentParser(prog="python -m unimatrix.reports", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail on a difference")
    check = parser.parse_args().check
    root = Path()
    stale = find_stale_documents(root, read_records(root / "results"))
    if check and stale:
        sys.stderr.write(f"differs from the records: {', '.join(map(str, stale))}\n")
        return 1
    for document, text in stale.items():
        write_file(document, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
