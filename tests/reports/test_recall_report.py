"""A report of recall runs says what was measured and needs nothing but itself."""

import base64
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from unimatrix.errors import InputError
from unimatrix.reports.recall_report import write_recall_report
from unimatrix.reports.recall_results import average_copy_rule, format_fraction, group_results

GRID_B = {
    "64x4": 1.0,
    "64x8": 0.9987,
    "64x16": 0.9876,
    "128x32": 0.9765,
    "256x64": 0.9654,
    "512x128": 0.9543,
    "1024x256": 0.9432,
}
VOID_TAGS = {"meta", "img"}


def make_result(
    task: str = "mqar-b", accuracy: dict[str, float] | None = None, seed: int = 0, **recipe: Any
) -> dict[str, Any]:
    """Return what a recall run would."""
    accuracy = GRID_B if accuracy is None else accuracy
    rules = {"after_last_match": 0.8123, "after_first_match": 1.0, "suffix_automaton": 0.7012}
    return {
        "task": task,
        "accuracy": dict(accuracy),
        "mean_accuracy": sum(accuracy.values()) / len(accuracy),
        "copy_rules": {name: dict(rules) for name in accuracy},
        "parameters": 569_795,
        "state_bytes": 1800,
        "state_bytes_by_part": {"slots": 1792, "matrix_state": 0, "position": 8},
        "train_s": 71.2,
        "recipe": {"task": task, "preset": "unimatrix", "seed": seed, "num_slots": 256} | recipe,
    }


class Page(HTMLParser):
    """Reads cells, headings and addresses, and checks that tags close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.addresses: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in VOID_TAGS:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def write(path: Path, *results: dict[str, Any]) -> Page:
    """Write a report and read it."""
    write_recall_report(results, path)
    return Page(path.read_text(encoding="utf-8"))


def test_one_run_is_reported_in_full(tmp_path: Path) -> None:
    path = tmp_path / "new" / "recall.html"
    page = write(path, make_result())
    for name, accuracy in GRID_B.items():
        shown = f"{accuracy:.4f}"
        assert [name, shown, shown, "0.8123", "1.0000", "0.7012"] in page.rows
    mean = f"{sum(GRID_B.values()) / 7:.4f}"
    assert ["mean of 7", mean, mean, "0.8123", "1.0000", "0.7012"] in page.rows
    for row in (
        ["parameters", "569,795"],
        ["state", "1,800 bytes"],
        ["training", "71.2 s"],
        ["seed", "0"],
        ["slots", "1,792"],
        ["matrix state", "0"],
        ["all", "1,800"],
        ["DeltaNet", "0.793 at 8.7 KiB, 0.963 at 33 KiB, 0.995 at 131 KiB"],
    ):
        assert row in page.rows


def test_the_page_needs_nothing_but_itself(tmp_path: Path) -> None:
    path = tmp_path / "recall.html"
    page = write(path, make_result(), make_result("associative", {"4": 0.9, "6": 0.8, "8": 0.7}))
    assert len(page.addresses) == 2
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert not page.tags & {"script", "link", "iframe"}
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"https?://|url\(|@import", text)
    # The main plot stands beside the page, the same as in it.
    picture = path.with_suffix(".png")
    assert picture.read_bytes() == base64.b64decode(page.addresses[0].partition(",")[2])
    with Image.open(picture) as image:
        assert image.format == "PNG"
        assert image.width >= 1600
        assert len(image.convert("RGB").getcolors(2**24) or []) > 50
    assert sorted(tmp_path.iterdir()) == [path, picture]


def test_runs_of_one_configuration_are_averaged(tmp_path: Path) -> None:
    low, high = GRID_B, dict.fromkeys(GRID_B, 1.0)
    page = write(
        tmp_path / "recall.html",
        make_result(accuracy=low, seed=3),
        make_result(accuracy=high, seed=4),
        make_result(accuracy=dict.fromkeys(GRID_B, 0.5), num_slots=128),
    )
    assert ["1024x256", "0.9716", "0.9432", "0.8123", "1.0000", "0.7012"] in page.rows
    assert ["1024x256", "0.5000", "0.5000", "0.8123", "1.0000", "0.7012"] in page.rows
    assert ["seeds", "3, 4"] in page.rows


def test_configurations_have_names_of_their_own() -> None:
    results = [
        make_result(),
        make_result(steps=50),
        make_result() | {"parameters": 1},
        make_result(num_slots=None, steps=50),
    ]
    names = [one.name for one in group_results(results)["mqar-b"]]
    assert len(set(names)) == len(results)
    assert names[1] == "unimatrix, 256 slots, steps 50"


def test_a_task_without_mqar_b_is_the_main_plot(tmp_path: Path) -> None:
    results = [
        make_result("associative", {"4": 0.9 - 0.1 * seed, "6": 0.05, "8": 0.0}, seed)
        for seed in range(3)
    ]
    page = write(tmp_path / "recall.html", *results)
    assert ["4", "0.8000", "0.7000", "0.8123", "1.0000", "0.7012"] in page.rows
    assert len(page.addresses) == 1
    assert (tmp_path / "recall.png").exists()


def test_a_slice_without_copy_rules_says_so(tmp_path: Path) -> None:
    result = make_result("needle", {"1024": 1.0, "131072": 0.97})
    del result["copy_rules"]["131072"]
    page = write(tmp_path / "recall.html", result)
    nothing = ["not measured"] * 3
    assert ["131072", "0.9700", "0.9700", *nothing] in page.rows
    assert ["mean of 2", "0.9850", "0.9850", *nothing] in page.rows
    configurations = group_results([result])["needle"]
    assert average_copy_rule(configurations, "after_last_match", ["1024", "131072"]) is None


@pytest.mark.parametrize("task", ["mqar-b", "<img src=x onerror=alert(1)>"])
def test_hostile_text_is_escaped(tmp_path: Path, task: str) -> None:
    hostile = "</td><script>alert('$x_{$')</script>"
    result = make_result(task, {hostile: 0.5, "$\\frac{$": 0.25}, preset=hostile)
    result["state_bytes_by_part"] = {hostile: 1800}
    page = write(tmp_path / "recall.html", result)
    assert "script" not in page.tags
    assert all(address.startswith("data:") for address in page.addresses)
    assert [hostile, "0.5000", "0.5000", "0.8123", "1.0000", "0.7012"] in page.rows


def test_bars_stand_at_their_own_slice() -> None:
    from unimatrix.reports.recall_plots import plot_slices

    results = [
        make_result("needle", {"1024": 0.9, "16384": 0.8}),
        make_result("needle", {"16384": 0.7}, num_slots=64),
    ]
    for result in results:
        result["copy_rules"] = {}
    (axes,) = plot_slices(group_results(results)["needle"], "bytes").axes
    found = {(round(bar.get_x() + bar.get_width() / 2), bar.get_height()) for bar in axes.patches}
    assert found == {(0, 0.9), (1, 0.8), (1, 0.7)}
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1024", "16384"]


def test_nothing_is_rounded_up_to_perfect() -> None:
    assert format_fraction(1.0) == "1.0000"
    assert format_fraction(0.99996) == "> 0.9999"
    assert format_fraction(0.99994) == "0.9999"


def test_the_same_results_give_the_same_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_recall_report([make_result()], tmp_path / f"{name}.html")
    for suffix in (".html", ".png"):
        one, other = (tmp_path / f"{name}{suffix}" for name in ("a", "b"))
        assert one.read_bytes() == other.read_bytes()


def test_unusable_input(tmp_path: Path) -> None:
    path = tmp_path / "recall.html"
    with pytest.raises(InputError, match="0 recall results to report; pass at least one"):
        write_recall_report([], path)
    result = make_result()
    del result["train_s"]
    with pytest.raises(InputError, match="result 1 lacks train_s"):
        write_recall_report([make_result(), result], path)
    with pytest.raises(InputError, match="result 0 has no test"):
        write_recall_report([make_result() | {"accuracy": {}}], path)
    with pytest.raises(InputError, match="state_bytes of recall result 0 is 0"):
        write_recall_report([make_result() | {"state_bytes": 0}], path)
    with pytest.raises(InputError, match=r"ending in \.html"):
        write_recall_report([make_result()], tmp_path / "recall.png")
    assert list(tmp_path.iterdir()) == []


def test_matplotlib_waits_for_a_report() -> None:
    code = (
        "import sys; import unimatrix.reports.recall_report; from unimatrix.cli.main import app;"
        "heavy = {'matplotlib', 'numpy', 'torch'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_report_leaves_no_global_figure(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path;"
        "from tests.reports.test_recall_report import make_result, write_recall_report;"
        f"write_recall_report([make_result()], Path({str(tmp_path / 'recall.html')!r}));"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
