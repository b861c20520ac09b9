"""The streams of a command: always open, never in the way of what it does.

A result with characters that the terminal's encoding lacks is printed with replacements, a stream
that the shell has closed takes everything, and a log that nobody reads any more stops no work.
"""

import codecs
import io
import os
import sys

_ERRORS = "unimatrix-show"


def open_streams() -> None:
    """Make ``sys.stdin``, ``sys.stdout`` and ``sys.stderr`` safe to use."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        # Python has none where the shell closed it. In this order each gets its own number, which
        # the next file that is opened would have had, and with it what goes to the stream.
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    codecs.register_error(_ERRORS, _replace)
    # A log shows such characters by their numbers, as Python's own does.
    for stream, errors in ((sys.stdout, _ERRORS), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)
    if sys.stderr is sys.__stderr__ and isinstance(sys.stderr, io.TextIOWrapper):
        raw = _LogFile(sys.stderr.fileno(), "w", closefd=False)
        sys.stderr = io.TextIOWrapper(
            io.BufferedWriter(raw),
            encoding=sys.stderr.encoding,
            errors=sys.stderr.errors,
            line_buffering=True,
            write_through=True,
        )


def give_up_stdout() -> None:
    """Send what stdout still holds nowhere if nobody takes it; Python's end would complain."""
    try:
        sys.stdout.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


class _LogFile(io.FileIO):
    """Takes everything, also when the reader is gone or the disk is full: a log is no result."""

    def write(self, data: "bytes | bytearray | memoryview") -> int:  # type: ignore[override]
        try:
            return super().write(data)
        except OSError:
            return len(data)


def _replace(error: UnicodeError) -> tuple[bytes, int]:
    """Return the bytes that a name was made of where they are no text, and ? for the rest."""
    assert isinstance(error, UnicodeEncodeError)
    part = error.object[error.start : error.end]
    shown = (bytes([ord(c) - 0xDC00]) if 0xDC80 <= ord(c) <= 0xDCFF else b"?" for c in part)
    return b"".join(shown), error.end
