import json

import pytest
import torch

from tests.byte_models import build_byte_model, prefer, quiet_transformers, save_model
from tests.cli.command import assert_refused, run_command
from tests.locks import hold_elsewhere
from unimatrix.baselines.peers import PEERS
from unimatrix.configuration import UniMatrixConfig
from unimatrix.reports.long_context_results import list_reasons, tabulate_tasks
from unimatrix.reports.tables import TABLES
from unimatrix.studies.eval_long import run as long_context_run
from unimatrix.train.run_folder import RECORD_FILE

# This file is the text: the standard library takes a second to find.
TEXT = ("--data", __file__)
SMALL = ("--task", "niah_single_1", "--task", "cwe", "--length", 1024, "--examples", 1, *TEXT)


@pytest.fixture
def ours(tmp_path):
    return save_model(tmp_path / "ours", build_byte_model("unimatrix"))


@pytest.fixture
def peer(tmp_path):
    torch.manual_seed(0)
    config = UniMatrixConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=1)
    with quiet_transformers():
        PEERS["llama"].build(config, max_tokens=1100).save_pretrained(tmp_path / "peer")
    return str(tmp_path / "peer")


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes(b"It was the best of times, it was the worst of times.\n" * 60)
    return path


def test_a_model_and_a_peer_stand_in_the_same_tables(ours, peer, book, tmp_path) -> None:
    out, report = tmp_path / "out", tmp_path / "pages" / "long.html"
    tasks = ("--task", "niah_single_1", "--task", "vt", "--task", "book", "--task", "code")
    sizes = ("--length", 1024, "--length", 1500, "--examples", 1, "--data", book)
    paths = ("--out", out, "--report", report)
    answer = run_command("eval-long", ours, peer, *tasks, *sizes, *paths)
    assert answer.exit_code == 0, answer.stderr
    record = json.loads((out / RECORD_FILE).read_text())
    cells = {(c["model"], c["task"], c["total_bytes"]): c for c in record["cells"]}
    assert len(cells) == len(record["cells"]) == 2 * (2 * 2 + 2)
    assert record["status"] == "done"
    assert record["models"]["peer"]["limit_tokens"] == 1100
    assert cells["peer", "vt", 1024]["status"] == "done"
    assert cells["peer", "vt", 1500]["reason"] == "the model reads at most 1,100 tokens"
    assert cells["ours", "vt", 1500]["results"]["examples"] == 1
    for model in ("ours", "peer"):
        assert cells[model, "book", 1500]["results"]["bytes"] == 1500
        code = cells[model, "code", 1500]["results"]
        assert code["lines"]["examples"] == 10
        assert code["names"]["examples"] <= 100
    assert "peer, 2 tasks" not in answer.text
    assert "not run: peer, niah_single_1, vt at 1.46 KiB: the model reads at most" in answer.text
    assert "each sees" in answer.text
    page = report.read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "Not run" in page
    assert sorted(p.name for p in report.parent.iterdir()) == [
        "long-positions.png",
        "long-tasks.png",
        "long.html",
    ]
    for table in ("eval-long", "eval-long-text", "eval-long-code"):
        text = TABLES[table]({"eval-long/first": record})
        assert text.startswith("`first`, text of book.txt, 1 examples, seed 0:\n\n| ")
        assert "| ours |" in text or "| peer |" in text or "ours | peer |" in text
        assert TABLES[table]({}) == "No evaluation is recorded yet."


def test_what_is_finished_is_not_run_again(ours, peer, tmp_path, monkeypatch) -> None:
    out = tmp_path / "out"
    first = run_command("eval-long", ours, *SMALL, "--out", out, "--json").result
    measured: list[str] = []
    measure = long_context_run.measure_task

    def watch(reader, *arguments, **options):
        measured.append(reader.name)
        return measure(reader, *arguments, **options)

    monkeypatch.setattr(long_context_run, "measure_task", watch)
    again = run_command("eval-long", ours, *SMALL, "--out", out, "--json").result
    assert again["cells"] == first["cells"]
    assert measured == []
    more = run_command("eval-long", ours, peer, *SMALL, "--out", out, "--json").result
    assert measured == [peer]
    assert [cell["model"] for cell in more["cells"]] == ["ours", "ours", "peer", "peer"]
    run_command("eval-long", ours, *SMALL, "--length", 1100, "--out", out)
    assert measured == [peer, ours]
    before = (out / RECORD_FILE).read_bytes()
    answer = run_command("eval-long", ours, *SMALL, "--out", out, "--seed", 1)
    assert_refused(answer, "has ours measured with another seed; choose another --out")
    save_model(tmp_path / "ours", build_byte_model("unimatrix", seed=1))
    answer = run_command("eval-long", ours, *SMALL, "--out", out)
    assert_refused(answer, "measured with another weights_sha256")
    assert (out / RECORD_FILE).read_bytes() == before


def test_an_interruption_keeps_what_was_done(ours, tmp_path, monkeypatch) -> None:
    out, calls = tmp_path / "out", []
    measure = long_context_run.measure_task

    def interrupt(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(*arguments, **options)

    monkeypatch.setattr(long_context_run, "measure_task", interrupt)
    options = ("--task", "niah_single_1", "--task", "vt", "--length", 1024, "--examples", 1, *TEXT)
    answer = run_command("eval-long", ours, *options, "--out", out)
    assert answer.exit_code == 1
    assert "run the same command again to go on" in answer.stderr
    cells = json.loads((out / RECORD_FILE).read_text())["cells"]
    assert [cell["task"] for cell in cells] == ["niah_single_1"]
    assert run_command("eval-long", ours, *options, "--out", out).exit_code == 0
    assert len(calls) == 3


def test_what_a_task_does_not_fit_is_said_once(ours, peer) -> None:
    result = run_command("eval-long", ours, peer, *SMALL, "--json").result
    assert list_reasons(result) == [
        "every model, cwe at 1 KiB: 1,024 bytes are too few for the task, which needs 2,200"
    ]
    rows = tabulate_tasks(result).rows
    assert [row[:2] for row in rows[:2]] == [["niah_single_1", "ours"], ["niah_single_1", "peer"]]
    assert [row[2] for row in rows if row[0] == "cwe"] == ["-", "-"]
    assert all(row[2].endswith(" of 1") for row in rows if row[0] == "mean")


def test_equal_folder_names_are_told_apart(tmp_path) -> None:
    model = prefer(build_byte_model(), ord("e"))
    one, two = save_model(tmp_path / "a" / "run", model), save_model(tmp_path / "b" / "run", model)
    options = ("--task", "niah_single_1", "--length", 1024, "--examples", 1, *TEXT, "--json")
    assert list(run_command("eval-long", one, two, *options).result["models"]) == [one, two]


def test_quick_is_three_lengths(ours) -> None:
    result = run_command("eval-long", ours, "--quick", "--task", "vt", *TEXT, "--json").result
    assert result["plan"]["lengths"] == [1024, 4096, 16_384]
    assert result["plan"]["num_examples"] == 2


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("--task", "niah_single_4"), ("unknown task", "Did you mean 'niah_single_")),
        (("--task", "vt", "--task", "vt"), ("task names vt, vt", "each once")),
        (("--length", 0), ("lengths are (0,)", "at least 1")),
        (("--examples", 0), ("examples 0", "at least 1")),
        (("--data", "no-such-file"), ("is no file",)),
        (("--report", "page.txt"), ("name ending in .html",)),
        (("--device", "tpu"), ("unknown device 'tpu'",)),
    ],
)
def test_unusable_options(ours, tmp_path, options, parts) -> None:
    out = tmp_path / "out"
    assert_refused(run_command("eval-long", ours, *options, "--out", out), *parts)
    assert not out.exists()


def test_unusable_models_and_folders(ours, tmp_path) -> None:
    out = tmp_path / "out"
    answer = run_command("eval-long", ours, tmp_path / "no", *SMALL, "--out", out)
    assert_refused(answer, "there is no run folder")
    assert_refused(run_command("eval-long", ours, ours, *SMALL, "--out", out), "model names")
    assert_refused(run_command("eval-long", "core", *SMALL), "'core' is a preset")
    assert not out.exists()
    assert_refused(run_command("eval-long", ours, *SMALL, "--out", ours), "holds no record")
    out.mkdir()
    with hold_elsewhere(out):
        assert_refused(run_command("eval-long", ours, *SMALL, "--out", out), "is in use")
    (out / RECORD_FILE).write_text("{}")
    assert_refused(run_command("eval-long", ours, *SMALL, "--out", out), "is damaged")
