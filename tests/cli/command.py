"""Running ``unimatrix`` in this process, its streams and exit code as a shell would see them."""

import io
import json
import sys
from typing import Any, NamedTuple
from unittest import mock

from unimatrix.cli.main import main


class Answer(NamedTuple):
    """What a command left behind."""

    exit_code: int
    stdout: bytes
    stderr: str

    @property
    def text(self) -> str:
        """Return stdout as text."""
        return self.stdout.decode()

    @property
    def result(self) -> Any:
        """Return the one line of JSON on stdout."""
        (line,) = self.text.splitlines()
        return json.loads(line)


class _Stream(io.TextIOWrapper):
    def __init__(
        self, data: bytes = b"", *, is_terminal: bool = False, encoding: str = "utf-8"
    ) -> None:
        super().__init__(io.BytesIO(data), encoding=encoding, newline="")
        self._is_terminal = is_terminal

    def isatty(self) -> bool:
        return self._is_terminal

    def read_back(self) -> bytes:
        self.flush()
        return self.buffer.getvalue()


def run_command(
    *arguments: object, stdin: bytes = b"", terminal: bool = False, encoding: str = "utf-8"
) -> Answer:
    """Run one command line.

    Args:
        arguments: what follows ``unimatrix``.
        stdin: what is piped in.
        terminal: stdin and stdout are a terminal.
        encoding: of stdout and stderr.
    """
    out, err = _Stream(is_terminal=terminal, encoding=encoding), _Stream(encoding=encoding)
    patches = (
        mock.patch.object(sys, "argv", ["unimatrix", *map(str, arguments)]),
        mock.patch.object(sys, "stdin", _Stream(stdin, is_terminal=terminal)),
        mock.patch.object(sys, "stdout", out),
        mock.patch.object(sys, "stderr", err),
    )
    exit_code = 0
    try:
        for patch in patches:
            patch.start()
        main()
    except SystemExit as end:
        exit_code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        for patch in reversed(patches):
            patch.stop()
    return Answer(exit_code, out.read_back(), err.read_back().decode())


def assert_refused(answer: Answer, *parts: str) -> None:
    """Assert exit code 2, nothing on stdout and one sentence on stderr that holds the parts."""
    assert answer.exit_code == 2, answer
    assert answer.stdout == b""
    assert answer.stderr.startswith("error: ")
    assert answer.stderr.count("\n") == 1
    for part in parts:
        assert part in answer.stderr
