"""Figures in documents come from records."""

import re
from pathlib import Path

import pytest

from unimatrix.errors import InputError
from unimatrix.reports.__main__ import DOCUMENTS
from unimatrix.reports.tables import TABLES, read_records, render_document

ROOT = Path(__file__).parents[2]


def test_documents_agree_with_the_records() -> None:
    records = read_records(ROOT / "results")
    for document in DOCUMENTS:
        text = (ROOT / document).read_text(encoding="utf-8")
        assert render_document(text, records) == text, (
            f"run python -m unimatrix.reports: {document}"
        )


def test_every_table_stands_in_a_document() -> None:
    text = "".join((ROOT / document).read_text(encoding="utf-8") for document in DOCUMENTS)
    assert set(re.findall(r"<!-- table: ([a-z-]+) -->", text)) == set(TABLES)


def test_a_changed_record_changes_its_table() -> None:
    records = {
        f"pilot/core/seed-{seed}": {"results": {"bits_per_byte": bits}}
        for seed, bits in ((7, 5.06), (8, 5.08))
    }
    text = "before\n<!-- table: pilot -->\nold\n<!-- end -->\nafter\n"
    rendered = render_document(text, records)
    row = "| core | 5.084 | 5.0745 | 5.0600, 5.0800 | 5.0700 | -0.0045 | reproduced |"
    assert row in rendered
    assert "old" not in rendered
    records["pilot/core/seed-8"]["results"]["bits_per_byte"] = 5.4
    assert "not reproduced" in render_document(text, records)


def test_unknown_tables_and_missing_records(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Did you mean 'pilot'"):
        render_document("<!-- table: pilots -->\n<!-- end -->", {})
    with pytest.raises(InputError, match=r"no record\.json"):
        read_records(tmp_path)
