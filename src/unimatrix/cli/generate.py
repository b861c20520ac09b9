"""``unimatrix generate``: continue a prompt."""

import base64
import os
import secrets
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from unimatrix.cli.common import (
    DeviceOption,
    JsonOption,
    ModelArgument,
    PrimeOption,
    SeedOption,
    WindowOption,
    emit,
    make_log,
    open_prime,
    pick_device,
)
from unimatrix.cli.terminal import ByteDisplay, show_bytes
from unimatrix.errors import InputError, explain
from unimatrix.inference.sampling import DEFAULT_NEW_BYTES, DEFAULT_SAMPLING, Sampling
from unimatrix.train.field_types import read_field_docs

if TYPE_CHECKING:
    from unimatrix.inference.generation import Continuation

_DOCS = read_field_docs(Sampling)
_ECHOED_BYTES = 400
_STOPPED = {"eos": "the model's end of text", "length": "the limit"}


PromptArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="PROMPT",
        help="What to continue; - or nothing reads stdin, and at a terminal nothing starts a new "
        "text.",
        show_default=False,
    ),
]
PromptFileOption = Annotated[
    Path | None, typer.Option("--prompt-file", help="File whose bytes are the prompt.")
]
MaxNewBytesOption = Annotated[
    int | None,
    typer.Option(
        "--max-new-bytes",
        help="Stop after so many bytes. \\[default: "
        f"{DEFAULT_NEW_BYTES}, or what fits the model's position table]",
    ),
]
TemperatureOption = Annotated[float, typer.Option("--temperature", help=_DOCS["temperature"])]
TopPOption = Annotated[float, typer.Option("--top-p", help=_DOCS["top_p"])]
TopKOption = Annotated[int | None, typer.Option("--top-k", help=_DOCS["top_k"])]


def run(
    model: ModelArgument,
    prompt: PromptArgument = None,
    *,
    prompt_file: PromptFileOption = None,
    prime: PrimeOption = None,
    window: WindowOption = None,
    max_new_bytes: MaxNewBytesOption = None,
    temperature: TemperatureOption = DEFAULT_SAMPLING.temperature,
    top_p: TopPOption = DEFAULT_SAMPLING.top_p,
    top_k: TopKOption = None,
    seed: SeedOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Continue a prompt, byte by byte.

    A terminal shows the end of the prompt and then the new text, bytes that are no UTF-8 as U+FFFD
    and control characters as pictures. Elsewhere stdout gets the new bytes and nothing else,
    exactly as the model chose them. --json waits for the end; its "text" has U+FFFD where bytes
    are no UTF-8, its "base64" the exact bytes.
    """
    seed = secrets.randbelow(2**32) if seed is None else seed
    sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    data = read_prompt(prompt, prompt_file)
    place = pick_device(device)

    from unimatrix.hub.load import load_byte_model
    from unimatrix.inference.generation import generate_bytes
    from unimatrix.inference.streams import require_state

    loaded = load_byte_model(model, device=place)
    if window is not None:
        loaded.set_window(window)
    first = open_prime(prime)
    if first is not None:
        require_state(loaded)
        make_log().print(f"reading {len(first):,} bytes first ...")
    writer = _Writer(silent=as_json)
    writer.echo(data)
    continuation = generate_bytes(
        loaded,
        data,
        max_new_bytes=max_new_bytes,
        prime=first,
        sampling=sampling,
        on_bytes=writer.write,
    )
    writer.finish()
    _report(_describe(continuation, sampling.seed), as_json)


def read_prompt(prompt: str | None, prompt_file: Path | None) -> bytes:
    """Return the bytes to continue.

    Args:
        prompt: the command line's words; ``-`` is stdin, ``None`` too unless stdin is a terminal.
        prompt_file: the file to read instead.

    Raises:
        InputError: if both are given, or the file cannot be read.
    """
    if prompt_file is not None:
        if prompt is not None:
            raise InputError("there are a PROMPT and a --prompt-file; give one of them")
        try:
            return prompt_file.read_bytes()
        except OSError as error:
            raise InputError(
                f"cannot read --prompt-file {str(prompt_file)!r}: {explain(error)}"
            ) from error
    if prompt is not None and prompt != "-":
        # The bytes that were typed, valid UTF-8 or not.
        return os.fsencode(prompt)
    if sys.stdin is None or (prompt is None and sys.stdin.isatty()):
        return b""
    return sys.stdin.buffer.read()


class _Writer:
    """Writes new bytes to stdout as they come: as text on a terminal, exact elsewhere."""

    def __init__(self, *, silent: bool) -> None:
        self._silent = silent
        self._display = ByteDisplay() if sys.stdout.isatty() else None
        self._ends_with_newline = True

    def echo(self, prompt: bytes) -> None:
        """Show the end of the prompt, dimmed, on a terminal."""
        if self._silent or self._display is None or not prompt:
            return
        # A character that the cut splits would show as U+FFFD.
        shown = show_bytes(prompt[-_ECHOED_BYTES:]).lstrip("\ufffd")
        shown = shown if len(prompt) <= _ECHOED_BYTES else f"… {shown}"
        console = Console(highlight=False, soft_wrap=True)
        console.print(Text(shown, style="dim"), end="")
        self._ends_with_newline = shown.endswith("\n")

    def write(self, data: bytes) -> None:
        """Write new bytes."""
        if self._silent:
            return
        if self._display is None:
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
        else:
            self._show(self._display.feed(data))

    def finish(self) -> None:
        """Write bytes that were waiting for the rest of a character; end a terminal's last line."""
        if self._silent or self._display is None:
            return
        self._show(self._display.finish())
        if not self._ends_with_newline:
            self._show("\n")

    def _show(self, text: str) -> None:
        if text:
            sys.stdout.write(text)
            sys.stdout.flush()
            self._ends_with_newline = text.endswith("\n")


def _describe(continuation: "Continuation", seed: int) -> dict[str, Any]:
    num_bytes, seconds = len(continuation.data), continuation.seconds
    return {
        "text": continuation.data.decode("utf-8", errors="replace"),
        "base64": base64.b64encode(continuation.data).decode(),
        "bytes": num_bytes,
        "seconds": round(seconds, 4),
        "bytes_per_s": round(num_bytes / seconds, 1),
        "stopped": continuation.stopped,
        "seed": seed,
    }


def _report(result: dict[str, Any], as_json: bool) -> None:
    """Print the result as JSON; else stdout has the bytes already and stderr gets the figures."""
    if as_json:
        emit(result, True, str)
        return
    make_log().print(
        f"[dim]{result['bytes']:,} bytes in {result['seconds']:.1f} s "
        f"({result['bytes_per_s']:.0f} bytes/s), seed {result['seed']}, "
        f"stopped by {_STOPPED[result['stopped']]}[/]"
    )
