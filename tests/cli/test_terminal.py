import sys
from unittest import mock

import pytest
from rich.table import Table

from unimatrix.cli.terminal import ByteDisplay, show_bytes, to_text

TEXT = "naïve — 日本語 🎈\tend\n"


def test_text_in_any_split_shows_itself() -> None:
    data = TEXT.encode()
    for size in (1, 2, 3, 5):
        display = ByteDisplay()
        shown = [display.feed(data[i : i + size]) for i in range(0, len(data), size)]
        assert "".join(shown) + display.finish() == TEXT
        assert "\ufffd" not in "".join(shown)


def test_half_a_character_waits_and_shows_at_the_end() -> None:
    display = ByteDisplay()
    assert display.feed("é".encode()[:1]) == ""
    assert display.finish() == "\ufffd"
    assert show_bytes(b"a" + "日".encode()[:2]) == "a\ufffd"


def test_bytes_that_are_no_text() -> None:
    assert show_bytes(b"a\xff\xfeb") == "a\ufffd\ufffdb"


def test_controls_cannot_steer_the_terminal() -> None:
    assert show_bytes(b"\x1b[31m\x07\r\x7f\n\t") == "␛[31m␇␍␡\n\t"
    assert show_bytes("\x9b31m".encode()) == "\ufffd31m"
    shown = "".join(map(show_bytes, (bytes([value]) for value in range(256))))
    assert {character for character in shown if ord(character) < 0x20} == {"\n", "\t"}


@pytest.mark.parametrize("columns", [30, 60])
def test_tables_fit_the_terminal_and_are_plain_in_a_pipe(monkeypatch, columns) -> None:
    table = Table("name", "what it is", box=None)
    table.add_row("core", "a long story about what it is, longer than any narrow terminal is wide")
    assert "\x1b" not in to_text(table)
    assert len(to_text(table).splitlines()) == 2
    monkeypatch.setenv("COLUMNS", str(columns))
    with mock.patch.object(sys.stdout, "isatty", return_value=True):
        narrow = to_text(table, "[bold]end")
    assert len(narrow.splitlines()) > 3
