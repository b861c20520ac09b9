"""The streams of a command: always open, and never a reason to stop.

Characters that the terminal's encoding lacks are replaced, what is written to a stream that the
shell has closed is dropped, and so is a log that nobody reads any more.
"""

import codecs
import io
import os
import sys

_ERRORS = "unimatrix-show"


def open_streams() -> None:
    """Make ``sys.stdin``, ``sys.stdout`` and ``sys.stderr`` safe to use."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        # Python has no object for a stream that the shell has closed. In this order each stream
        # gets its own number; otherwise the next file that is opened would get the number, and the
        # output.
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    codecs.register_error(_ERRORS, _replace)
    # A log shows characters that the encoding lacks by their numbers.
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
    """Drop what stdout still holds if its reader is gone, lest Python complain when it ends."""
    try:
        sys.stdout.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


class _LogFile(io.FileIO):
    """A log that drops what it cannot write, as when the reader is gone or the disk is full."""

    def write(self, data: "bytes | bytearray | memoryview") -> int:  # type: ignore[override]
        try:
            return super().write(data)
        except OSError:
            return len(data)


def _replace(error: UnicodeError) -> tuple[bytes, int]:
    """Return the bytes that surrogates in a name stand for, and ? for other characters."""
    assert isinstance(error, UnicodeEncodeError)
    part = error.object[error.start : error.end]
    shown = (bytes([ord(c) - 0xDC00]) if 0xDC80 <= ord(c) <= 0xDCFF else b"?" for c in part)
    return b"".join(shown), error.end
