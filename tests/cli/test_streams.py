import os
import subprocess
import sys

import pytest

from tests.cli.command import run_command
from tests.cli.test_train import write_recipe
from tests.train.small_training import one_thread

__all__ = ["one_thread"]

# A verb that starts in no time and prints what an encoding may lack, on stdout and in a log.
PROGRAM = """
import sys
from unimatrix.cli import main
from unimatrix.cli.common import emit, make_log
from unimatrix.cli.terminal import to_text
from rich.table import Table

def show(lines: int = 1) -> None:
    make_log().print("log \\N{HORIZONTAL ELLIPSIS}")
    table = Table("\\N{REPLACEMENT CHARACTER}")
    for _ in range(lines):
        emit({}, False, lambda _: to_text(table) + " caf\\udce9 \\N{SNOWMAN}")

def end() -> None:
    raise EOFError("Ran out of input")

for verb in (show, end):
    main.app.command()(verb)
sys.argv[0] = "unimatrix"
main.main()
"""


def run_shell(line: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run a line of bash in which $U is the program, and fail if any part of a pipe fails."""
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", f'U() {{ "$PYTHON" -c "$PROGRAM" "$@"; }}; {line}'],
        capture_output=True,
        env={**os.environ, "PYTHON": sys.executable, "PROGRAM": PROGRAM, **environment},
    )


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252", "ascii", "latin-1"])
def test_what_an_encoding_lacks_is_replaced(encoding: str) -> None:
    done = run_shell("U show", PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    # A name that is no text comes out as the bytes that it was made of.
    assert b" caf\xe9 " in done.stdout
    assert done.stdout.rstrip().endswith("\N{SNOWMAN}".encode(encoding, "replace"))
    assert done.stderr.startswith(b"log ")
    assert done.stderr.count(b"\n") == 1


def test_a_result_is_printed_where_the_locale_has_no_such_characters() -> None:
    done = run_shell("U show", LC_ALL="POSIX", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert done.returncode == 0, done.stderr
    assert b"caf\xe9" in done.stdout


@pytest.mark.parametrize(
    "line",
    [
        "U show --lines 20000 | head -n 1 >&2",
        "U show | true",
        "U show >&-",
        "U show <&- >&- 2>&-",
        "U --help | true",
        "U --help >&-",
        "U show 2>/dev/full",
        "U show --lines 2000 2>&1 | head -n 1 > /dev/null",
    ],
)
def test_who_closes_a_stream_ends_the_command_quietly(line: str) -> None:
    done = run_shell(line)
    assert done.returncode == 0, done.stderr
    assert done.stdout == b"" or "2>" in line
    assert b"rror" not in done.stderr


def test_a_result_that_does_not_fit_the_disk_is_an_error() -> None:
    done = run_shell("U show > /dev/full 2> >(cat >&2)")
    assert done.returncode == 1
    assert done.stderr.decode().splitlines()[1:] == [
        "error: no space left on device (`unimatrix --traceback ...` shows where it arose)"
    ]


def test_the_end_of_a_file_is_an_error_like_any_other() -> None:
    done = run_shell("U end")
    assert done.returncode == 1
    assert done.stderr.decode() == (
        "error: EOFError: Ran out of input (`unimatrix --traceback ...` shows where it arose)\n"
    )
    done = run_shell("U --traceback end")
    assert b"in end\nEOFError: Ran out of input" in done.stderr


def test_verbs_print_their_results_in_any_encoding(tmp_path) -> None:
    """Of each verb that shows text or a table: train, generate, eval and info."""
    recipe, _ = write_recipe(tmp_path)
    run = tmp_path / "run"
    commands = (
        ("train", recipe, "--out", run, "--device", "cpu"),
        ("generate", run, "alpha", "--max-new-bytes", "40", "--seed", "1"),
        ("eval", run),
        ("info", run),
        ("info",),
    )
    for command in commands:
        for terminal in (False, True):
            if command[0] == "train" and terminal:
                continue
            answer = run_command(*command, terminal=terminal, encoding="ascii")
            assert answer.exit_code == 0, answer
            assert answer.stdout or command[0] == "generate"
