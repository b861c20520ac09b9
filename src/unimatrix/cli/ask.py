"""``unimatrix ask``: answer questions about a text, and show where the answers stand."""

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from unimatrix.cli.common import DeviceOption, JsonOption, make_log, pick_device
from unimatrix.cli.terminal import show_bytes
from unimatrix.errors import InputError
from unimatrix.hub.packaged import READER

if TYPE_CHECKING:
    from unimatrix.inference.text_reader import Answer, TextReader

_CHUNK_BYTES = 2**14
_MOST_REMEMBERED = 2**20
_ROOM_FOR_QUESTIONS = 512
"""What a question and its answer take of the window."""
_HALF_PASSAGE = 48
"""A passage nearer than this to an end of the text is not cut there."""

QuestionArgument = Annotated[
    str | None,
    typer.Argument(metavar="QUESTION", help="What to ask, in any words.", show_default=False),
]
QuestionOption = Annotated[
    list[str] | None,
    typer.Option("--question", help="One more question about the same text. Repeatable."),
]
FileOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--file",
        help="Text to read, of any length; several are read in their order as one text. "
        "Repeatable. \\[default: stdin]",
    ),
]
ModelOption = Annotated[
    str,
    typer.Option("--model", help="Run folder, checkpoint or saved model; by default the packaged."),
]
WindowOption = Annotated[
    int | None,
    typer.Option(
        "--window",
        help="Bytes of the text that are remembered, the last of them; even, at least 128. One "
        "costs 12 bytes of state, 20 from 32,768 on. \\[default: all of a file, at most 1,048,576]",
        show_default=False,
    ),
]


def run(
    question: QuestionArgument = None,
    *,
    questions: QuestionOption = None,
    file: FileOption = None,
    model: ModelOption = READER,
    window: WindowOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Read a text once, then answer questions about it.

    The text is read in constant memory, from files or a pipe. Every question continues the text and
    none the others. The answer is what the text says last; below it stands the passage that it was
    read from. Where the text does not say, the answer is "not in the text". Nothing is random.
    --json prints a line for each question; "passage" and "bytes_back" are null where there is none.
    """
    asked = _list_questions(question, questions)
    place = pick_device(device)
    text = _Source.open(file)

    from unimatrix.hub.load import load_byte_model
    from unimatrix.inference.text_reader import TextReader

    window = _choose_window(text.num_bytes) if window is None else window
    reader = TextReader(load_byte_model(model, device=place), window)
    seconds = _read_visibly(reader, text)
    for number, words in enumerate(asked):
        answer = reader.ask(words)
        if as_json:
            sys.stdout.write(json.dumps(_describe(answer, reader, seconds)) + "\n")
        else:
            _print(answer, reader, titled=len(asked) > 1, follows=number > 0)
        sys.stdout.flush()


def _choose_window(num_bytes: int | None) -> int:
    """Return the window that holds a text and some questions, or the most that is remembered."""
    if num_bytes is None:
        return _MOST_REMEMBERED
    needed = num_bytes + num_bytes % 2 + _ROOM_FOR_QUESTIONS
    return min(needed, _MOST_REMEMBERED)


def _list_questions(question: str | None, more: list[str] | None) -> list[str]:
    """Return the questions in their order, or raise ``InputError`` if one is missing or empty."""
    asked = [words for words in (question, *(more or [])) if words is not None]
    if not asked:
        raise InputError(
            'there is no question; write one, as in `unimatrix ask "who lives here?" --file FILE`'
        )
    for words in asked:
        if not words.strip():
            raise InputError(f"the question is {words!r}; ask in words")
    return asked


class _Source:
    """A text that is read once: files one after the other, or stdin.

    Args:
        chunks: its bytes, in parts that are not empty.
        num_bytes: of all of it; ``None`` is unknown.
    """

    def __init__(self, chunks: Iterator[bytes], num_bytes: int | None) -> None:
        self.chunks = chunks
        self.num_bytes = num_bytes

    @classmethod
    def open(cls, files: list[Path] | None) -> "_Source":
        """Open files, or stdin without any.

        Raises:
            InputError: if there is no text.
        """
        if not files:
            return cls._open_stdin()
        from unimatrix.data import ByteStream
        from unimatrix.data.files import find_file

        stream = ByteStream.from_files([find_file(str(path)) for path in files], name="text")
        size = len(stream)
        if size == 0:
            raise InputError(f"{str(files[0])!r} has no bytes; give a file with bytes in it")
        starts = range(0, size, _CHUNK_BYTES)
        chunks = (stream.read(i, min(i + _CHUNK_BYTES, size)).tobytes() for i in starts)
        return cls(chunks, size)

    @classmethod
    def _open_stdin(cls) -> "_Source":
        if sys.stdin.isatty():
            raise InputError("there is no text to read; give --file FILE, or pipe a text in")
        first = sys.stdin.buffer.read(_CHUNK_BYTES)
        if not first:
            raise InputError("stdin has no bytes; pipe a text in, or give --file FILE")

        def read_on() -> Iterator[bytes]:
            chunk = first
            while chunk:
                yield chunk
                chunk = sys.stdin.buffer.read(_CHUNK_BYTES)

        return cls(read_on(), None)


def _read_visibly(reader: "TextReader", text: _Source) -> float:
    """Read all of a text, with a progress bar; return the seconds it took."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    log = make_log()
    columns = (TextColumn("reading"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    start = time.perf_counter()
    with Progress(*columns, console=log, transient=True, disable=not log.is_terminal) as progress:
        bar = progress.add_task("reading", total=text.num_bytes)
        for chunk in text.chunks:
            # Small parts, so that the bar moves and Ctrl-C is heard.
            reader.read(chunk)
            progress.advance(bar, len(chunk))
        reader.catch_up()
    seconds = time.perf_counter() - start
    log.print(
        f"[dim]read {reader.bytes_read:,} bytes in {seconds:.1f} s; the model carries "
        f"{reader.state_bytes:,} bytes[/]"
    )
    if reader.bytes_read > reader.window:
        log.print(
            f"the model remembers the last {reader.window:,} bytes of a text; what stood before "
            "them cannot be asked for"
        )
    return seconds


def _describe(answer: "Answer", reader: "TextReader", read_seconds: float) -> dict[str, Any]:
    """Return an answer as JSON types."""
    passage = answer.passage
    return {
        "question": os.fsencode(answer.question).decode("utf-8", errors="replace"),
        "answer": answer.text,
        "passage": None if passage is None else passage.decode("utf-8", errors="replace"),
        "bytes_back": answer.bytes_back,
        "bytes_read": reader.bytes_read,
        "state_bytes": reader.state_bytes,
        "read_seconds": round(read_seconds, 4),
        "seconds": round(answer.seconds, 4),
    }


def _print(answer: "Answer", reader: "TextReader", *, titled: bool, follows: bool) -> None:
    """Print an answer, its passage below; with several questions the question above."""
    console = Console(highlight=False, soft_wrap=True)
    if follows:
        console.print()
    if titled:
        console.print(Text(show_bytes(os.fsencode(answer.question)), style="dim"))
    shown = show_bytes(answer.data)
    console.print(Text(shown or "(an empty answer)", style="bold"))
    if answer.passage is None or answer.bytes_back is None:
        return
    place = reader.bytes_read - answer.bytes_back
    before = "… " if place > _HALF_PASSAGE else ""
    after = " …" if answer.bytes_back > _HALF_PASSAGE else ""
    passage = " ".join(show_bytes(answer.passage).strip("\ufffd").split())
    quoted = Text(f"  {before}{passage}{after}", style="dim")
    if shown:
        quoted.highlight_words([shown], style="bold not dim")
    console.print(quoted)
    place = reader.bytes_read - answer.bytes_back
    console.print(Text(f"  at byte {place:,}, {answer.bytes_back:,} before the end", style="dim"))
