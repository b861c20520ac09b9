"""What a terminal shows: text out of any bytes, and tables that fit its width."""

import codecs
import shutil
import sys
import unicodedata
from io import StringIO

from rich.console import Console, RenderableType

_PIPE_COLUMNS = 100


class ByteDisplay:
    """Turn bytes, as they come, into text that is safe to show.

    A character that is cut between two calls waits for its rest. Bytes that are no UTF-8 become
    U+FFFD. Control characters, which could steer the terminal, become pictures (Escape is ␛).
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, data: bytes) -> str:
        """Return what can be shown now."""
        return "".join(map(_picture, self._decoder.decode(data)))

    def finish(self) -> str:
        """Return what still waits for the rest of a character."""
        return self._decoder.decode(b"", final=True)


def show_bytes(data: bytes) -> str:
    """Return all of ``data`` as text that is safe to show."""
    display = ByteDisplay()
    return display.feed(data) + display.finish()


def to_text(*parts: RenderableType) -> str:
    """Return what rich renders: no wider than the terminal, and coloured on a terminal only."""
    is_terminal = sys.stdout.isatty()
    columns = shutil.get_terminal_size().columns if is_terminal else _PIPE_COLUMNS
    file = StringIO()
    console = Console(file=file, width=columns, force_terminal=is_terminal, highlight=False)
    console.print(*parts, sep="\n")
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def _picture(character: str) -> str:
    """Return a character, or a picture of it if it is a control other than newline and tab."""
    if character in "\n\t" or unicodedata.category(character) != "Cc":
        return character
    code = ord(character)
    return chr(0x2400 + code) if code < 0x20 else "\u2421" if code == 0x7F else "\ufffd"
