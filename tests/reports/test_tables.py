"""Figures in documents come from records."""

import re
from pathlib import Path

import pytest

from unimatrix.errors import InputError
from unimatrix.reports.tables import DOCUMENTS, TABLES, render_document
from unimatrix.studies.records import read_records

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


def lab_record(accuracy: dict[str, float]) -> dict:
    """Return what the lab's tables read of a record."""
    return {
        "results": {
            "accuracy": accuracy,
            "copy_rules": {"64x4": {"after_last_match": 0.25, "suffix_automaton": 0.5}},
            "state_bytes": 1812,
            "parameters": 1000,
            "train_s": 10.0,
            "recipe": {
                "test_examples": 800,
                "steps": 600,
                "batch_size": 32,
                "learning_rate": 3e-3,
            },
        }
    }


def test_the_lab_shows_mean_worst_and_copying_and_never_rounds_up_to_everything() -> None:
    records = {
        "lab/mqar/mqar-b/seed-0": lab_record({"64x4 in 4 slots": 1.0, "64x4 in 2 slots": 0.5}),
        "lab/mqar/mqar-b/seed-1": lab_record({"64x4 in 4 slots": 0.99999, "64x4 in 2 slots": 0.4}),
    }
    table = render_document("<!-- table: lab-mqar -->\n<!-- end -->", records)
    assert "| mqar-b | 64x4 in 4 slots | > 99.99 | > 99.99 | 50.0 | 2 x 800 |" in table
    assert "| mqar-b | 64x4 in 2 slots | 45.00 | 40.00 | 50.0 |" in table
    # The summary leaves out what no memory of two slots can do.
    summary = render_document("<!-- table: lab-summary -->\n<!-- end -->", records)
    assert "| mqar-b | > 99.99 | > 99.99 | 50.0 | 1,812 | 1,000 | 10 |" in summary


def test_unknown_tables_and_missing_records(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Did you mean 'pilot'"):
        render_document("<!-- table: pilots -->\n<!-- end -->", {})
    with pytest.raises(InputError, match=r"no record\.json"):
        read_records(tmp_path)


def test_books_stand_beside_every_compressor() -> None:
    scores = {"xz -9e": {"plain": 2.4}, "PPMd": {"plain": 1.9, "primed": 1.78}}
    common = {"bytes": 2000, "state_bytes": 3000, "parameters": 4000}
    records = {
        "books/alone": {"results": common | {"bits_per_byte": 2.1, "context": "carried"}},
        "books/novel": {
            "results": common
            | {"bits_per_byte": 1.7, "context": "carried, after 9 bytes", "compressors": scores}
        },
        "books/training": {"results": {"valid_bytes": 1}},
    }
    text = "<!-- table: books -->\n<!-- end -->\n"
    rendered = render_document(text, records)
    assert "| novel | 2,000 | carried, after 9 bytes | 3,000 | 1.700 | 2.400 | 1.900 / 1.780 |" in (
        rendered
    )
    assert "alone | 2,000 | carried | 3,000 | 2.100 |  |  |" in rendered
    assert "training" not in rendered
    assert "No book is recorded yet." in render_document(text, {})


def test_a_summary_has_a_column_for_every_corpus_and_budget() -> None:
    def cell(bits: float | None, **test: float) -> dict:
        results = None if bits is None else {"valid_bits_per_byte": bits, **test}
        status = "failed" if bits is None else "done"
        steps = {"num_optim_steps": 600, "asked": {"steps": 600}}
        return {"parameters": 1000, "status": status, "results": results, **steps}

    slow = cell(2.5, test_bits_per_byte=2.6) | {"num_optim_steps": 267}
    records = {
        "compare/small/parameters/books/llama": slow,
        "compare/small/parameters/books/ours": cell(2.0, test_bits_per_byte=2.1),
        "compare/small/time/code/ours": cell(1.5),
        "compare/small/time/code/llama": cell(None),
    }
    text = "<!-- table: compare-summary -->\n<!-- end -->\n"
    rendered = render_document(text, records)
    assert "| model | parameters | books, equal steps | code, equal time |" in rendered
    assert "| ours | 1,000 | 2.100 | 1.500 |" in rendered
    assert "| llama | 1,000 | 2.600 (267 of 600 steps) | diverged |" in rendered


def test_tasks_that_nothing_answered_share_a_row() -> None:
    def cell(task: str, score: float | None, total_bytes: int = 1024) -> dict:
        place = {"task": task, "model": "ours", "total_bytes": total_bytes}
        if score is None:
            return {**place, "status": "skipped", "reason": "too few bytes"}
        return {**place, "status": "done", "results": {"score": score}}

    record = {
        "models": {"ours": {}},
        "plan": {"num_examples": 5, "data": ["pystdlib"]},
        "seed": 0,
        "cells": [
            *(cell("niah_single_1", 0.0, n) for n in (1024, 4096)),
            *(cell("niah_single_2", 0.5, n) for n in (1024, 4096)),
            *(cell("vt", 0.0, n) for n in (1024, 4096)),
            cell("cwe", None, 1024),
            cell("cwe", 0.0, 4096),
            *(cell("fwe", None, n) for n in (1024, 4096)),
        ],
    }
    table = TABLES["eval-long"]({"eval-long/small": record})
    assert "| niah_single_1, vt | all that can read it | 0.0 | 0.0 |" in table
    assert "| cwe | all that can read it | - | 0.0 |" in table
    assert "| niah_single_2 | ours | 50.0 | 50.0 |" in table
    assert "| fwe | ours | - | - |" in table
    assert "| mean | ours | 16.7 of 3 | 12.5 of 4 |" in table
    assert table.count("\n| ") == 7
