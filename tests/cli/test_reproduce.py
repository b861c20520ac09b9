import pytest

from tests.cli.command import assert_refused, run_command
from tests.locks import hold_elsewhere
from unimatrix.studies.reproduce import run
from unimatrix.studies.reproduce.claims import load_claims


@pytest.fixture
def sizes_only(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "list_cells", lambda groups: [load_claims()[0]["sizes"]])
    return tmp_path / "results"


def test_tables_are_written_and_checked(sizes_only) -> None:
    answer = run_command("reproduce", "--only", "lm", "--device", "cpu")
    assert answer.exit_code == 0, answer
    assert "transformer, parameters" in answer.text
    assert "4 not run, 4 reproduced (published, ours)" in answer.text
    assert answer.stderr == "sizes/seed-0 (1 left)\n"
    names = ("reproduce.html", "reproduce.json", "reproduce.md")
    assert sorted(p.name for p in sizes_only.iterdir()) == [".lock", *names, "sizes"]
    assert "| core, parameters | 83,140 |" in (sizes_only / "reproduce.md").read_text()

    with hold_elsewhere(sizes_only):
        assert_refused(run_command("reproduce", "--only", "lm"), "is in use")
        checked = run_command("reproduce", "--check")  # Who reads asks for nothing.
    assert (checked.exit_code, checked.stderr) == (0, "")
    again = run_command("reproduce", "--only", "lm", "--json")
    assert again.stderr == ""
    assert again.result["verdicts"] == {"not run": 4, "reproduced": 4}

    record = sizes_only / "sizes" / "seed-0" / "record.json"
    record.write_text(record.read_text().replace("83140", "83141"))
    stale = run_command("reproduce", "--check")
    assert stale.exit_code == 1
    assert "differs from the records: results/reproduce.json" in stale.stderr
    record.write_text("")
    assert_refused(run_command("reproduce", "--check"), "record.json is damaged")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("--only", "recal"), ("unknown part 'recal'", "Did you mean 'recall'?")),
        (("--check", "--out", "nowhere"), ("nowhere holds no record.json",)),
    ],
)
def test_refused(sizes_only, options, parts) -> None:
    assert_refused(run_command("reproduce", *options), *parts)
    assert not sizes_only.exists()
