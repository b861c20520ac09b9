"""The report of a comparison says what its records say, and needs nothing but itself."""

import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.reports.test_recall_report import Page
from unimatrix.errors import InputError
from unimatrix.reports import compare_plots, figures
from unimatrix.reports.compare_report import write_compare_report
from unimatrix.reports.compare_results import (
    tabulate_compressors,
    tabulate_models,
    tabulate_recall,
    tabulate_sweep,
    tabulate_text,
)
from unimatrix.reports.tables import TABLES

RECALL = {"steps": 400, "test_pairs": [4, 8], "test_tokens": [128, 512]}


def make_cell(model: str, *, bits: float | None = 2.0, steps: int = 100, **asked: Any):
    """Return the record of a cell of text; without bits it diverged."""
    results = None
    if bits is not None:
        results = {
            "valid_bits_per_byte": bits,
            "test_bits_per_byte": bits + 0.25,
            "context": "carried",
            "by_position": [[128, bits + 1], [256, bits], [300, bits - 1]],
            "state_bytes": {"1024": 2048, "65536": 4096},
        }
    entry = {"preset": "core", "peer": None, "overrides": {"head_dim": 8}, "recall_overrides": {}}
    return {
        "status": "failed" if bits is None else "done",
        "asked": {
            "model": model,
            "entry": entry,
            "size": {"hidden_size": 64, "inner_size": 99},
            "learning_rate": 2e-3,
            "steps": 100,
            "minutes": 1.0,
        }
        | asked,
        "num_optim_steps": steps,
        "parameters": 12_345,
        "train_s": 61.4,
        "tokens": 5000,
        "tokens_per_s": 1234.5,
        "loss_curve": [[10, 5.0], [50, 3.0], [100, 2.0]],
        "results": results,
    }


def test_the_comparison_of_books_has_a_table_of_its_own(tmp_path) -> None:
    cells = {
        "time/books/llama": make_cell("llama", steps=77),
        "time/books/mamba2": make_cell("mamba2", bits=None),
    }
    cells["time/books/llama"]["asked"]["steps"] = None
    peers = {f"compare/books/{name}": cell for name, cell in cells.items()}
    table = TABLES["book-models"](peers)
    assert "| llama | 2.000 | 2.250 | 12,345 | 77 |" in table
    assert "| mamba2 | diverged |" in table
    assert "llama" not in TABLES["compare-time"](peers)
    write_compare_report(cells, tmp_path / "report.html")


def test_recall_has_a_column_where_it_was_asked_for() -> None:
    records = {"time/text/a": make_cell("a")}
    assert "recall, 4 bindings" not in tabulate_text(records, "time", "text").header
    asked = {"recall/a": {"status": "failed"}}
    table = tabulate_text(records | asked, "time", "text")
    assert table.rows[0][table.header.index("recall, 4 bindings")] == ""
    assert {len(row) for row in table.rows} == {len(table.header)}


@pytest.mark.parametrize("table", ["time", "parameters"])
def test_one_table_fills_both_panels(table) -> None:
    records = {f"{table}/text/a": make_cell("a")}
    styles = figures.list_styles(["a"])
    panels = compare_plots.plot_training(records, "text", styles).axes
    ends = [axes.lines[0].get_xdata()[-1] for axes in panels]
    assert ends == pytest.approx([61.4, 5000])


def test_ours_stands_out_whatever_the_order(tmp_path, monkeypatch) -> None:
    seen: list[list[str]] = []
    kept = figures.list_styles

    def watch(models):
        seen.append(list(models))
        return kept(seen[-1])

    monkeypatch.setattr(figures, "list_styles", watch)
    peer = make_cell("a")
    peer["asked"]["entry"] = {"preset": None, "peer": "llama", "overrides": {}}
    peer["asked"]["entry"]["recall_overrides"] = {}
    records = {"time/text/a": peer, "time/text/b": make_cell("b")}
    write_compare_report(records, tmp_path / "report.html")
    assert seen == [["b", "a"]]


def make_recall(model: str, accuracy: float, *, lengths: int = 2):
    """Return the record of a cell of recall."""
    by_tokens = dict(zip(("128", "512"), (accuracy, accuracy / 2), strict=True))
    record = make_cell(model, steps=400, recall=RECALL)
    record["results"] = {
        "accuracy_by_pairs": {"4": accuracy, "8": accuracy / 4},
        "accuracy_by_tokens": dict(list(by_tokens.items())[:lengths]),
    }
    return record


def make_records() -> dict[str, dict[str, Any]]:
    """Return a small comparison."""
    scores = {split: {"plain": 2.5, "primed": 1.9} for split in ("valid", "test")}
    return {
        "compressors/words": {
            "status": "done",
            "asked": {"corpus": "words"},
            "missing": {"PPMd": "pyppmd"},
            "results": {"xz -9e": scores},
        },
        "sweep/a/lr-0.001": make_cell("a", bits=3.0, learning_rate=1e-3),
        "sweep/a/lr-0.002": make_cell("a", bits=2.9),
        "sweep/b/lr-0.001": make_cell("b", bits=2.8, learning_rate=1e-3),
        "sweep/b/lr-0.002": make_cell("b", bits=None),
        "parameters/words/a": make_cell("a", bits=2.5),
        "parameters/words/b": make_cell("b", bits=2.25, steps=60),
        "parameters/words/c": make_cell("c", bits=None),
        "time/words/a": make_cell("a", bits=2.125, steps=300)
        | {"asked": make_cell("a", steps=300)["asked"] | {"steps": None}},
        "recall/a": make_recall("a", 0.9996),
        "recall/b": make_recall("b", 0.125, lengths=1),
        "recall/c": make_cell("c", bits=None) | {"status": "training"},
    }


def test_the_best_stands_first_and_the_diverged_last() -> None:
    table = tabulate_text(make_records(), "parameters", "words")
    assert table.header[7:10] == ["learning rate", "state bytes at 1,024", "state bytes at 65,536"]
    facts = ["61", "1,234", "0.002", "2,048", "4,096"]
    assert table.rows == [
        ["b", "2.250", "2.500", "12,345", "60 of 100", *facts, "12.5", "carried"],
        ["a", "2.500", "2.750", "12,345", "100", *facts, "> 99.9", "carried"],
        ["c", "diverged", "", "12,345", "", "", "", "0.002", "", "", "", ""],
    ]
    assert all(len(row) == len(table.header) for row in table.rows)
    (timed,) = tabulate_text(make_records(), "time", "words").rows
    assert timed[4:6] == ["300", "61"]
    busy = make_records()
    busy["time/words/a"]["train_s"] = 80.0
    (timed,) = tabulate_text(busy, "time", "words").rows
    assert timed[5] == "80 (planned 60)"


def test_the_other_tables() -> None:
    records = make_records()
    assert tabulate_sweep(records).rows == [
        ["a", "3.000", "2.900 (chosen)"],
        ["b", "2.800 (chosen)", "diverged"],
    ]
    assert [row[:5] for row in tabulate_recall(records).rows] == [
        ["a", "> 99.9", "25.0", "> 99.9", "50.0"],
        ["b", "12.5", "3.1", "12.5", ""],
    ]
    assert tabulate_compressors(records).rows == [
        ["words", "xz -9e", "2.500", "1.900", "2.500", "1.900"],
        ["words", "PPMd", "needs pyppmd", "", "", ""],
    ]
    assert tabulate_models(records).rows[0] == ["a", "preset core", "64", "99", "head_dim=8", ""]


def test_the_page_holds_every_table_and_its_pictures(tmp_path: Path) -> None:
    path = tmp_path / "new" / "compare.html"
    write_compare_report(make_records(), path)
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    for table in (
        tabulate_text(make_records(), "parameters", "words"),
        tabulate_text(make_records(), "time", "words"),
        tabulate_recall(make_records()),
        tabulate_compressors(make_records()),
        tabulate_sweep(make_records()),
        tabulate_models(make_records()),
    ):
        for row in (table.header, *table.rows):
            assert row in page.rows
    names = ("training-words", "position-words", "state-words", "recall")
    pictures = sorted(tmp_path.rglob("*.png"))
    assert pictures == sorted(path.with_name(f"compare-{name}.png") for name in names)
    for picture in pictures:
        with Image.open(picture) as image:
            assert image.width >= 1600
    assert len(page.addresses) == len(names)
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert not re.search(r"https?://|<script", text)


def test_half_a_comparison_has_a_report(tmp_path: Path) -> None:
    records = {n: r for n, r in make_records().items() if n.startswith("parameters/words/a")}
    write_compare_report(records, tmp_path / "compare.html")
    assert not (tmp_path / "compare-recall.png").exists()
    unfinished = {n: r | {"status": "interrupted"} for n, r in records.items()}
    with pytest.raises(InputError, match="no cell of the comparison is finished"):
        write_compare_report(unfinished, tmp_path / "other.html")


def test_documents_get_the_same_tables() -> None:
    stored = {f"compare/small/{name}": record for name, record in make_records().items()}
    table = TABLES["compare-parameters"](stored)
    assert "| small | words | b | 2.250 | 2.500 | 12,345 | 60 of 100 |" in table
    assert "| small | words | a | 2.125 |" in TABLES["compare-time"](stored)
    assert "| small | a | > 99.9 |" in TABLES["compare-recall"](stored)
    assert "| small | words | xz -9e | 2.500 |" in TABLES["compare-compressors"](stored)
    assert TABLES["compare-time"]({}) == "No comparison is recorded yet."
