"""The ``unimatrix`` command: its verbs, and how an error becomes one sentence and an exit code.

Exit codes: 0 done, 1 failed or interrupted, 2 unusable input. A reader of the result that closes
its pipe, such as ``head``, ends the command quietly and with 0.
"""

import contextlib
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperGroup

import unimatrix
from unimatrix.cli import (
    ask,
    bench,
    compare,
    eval_long,
    evaluate,
    generate,
    info,
    recall,
    reproduce,
    train,
)
from unimatrix.cli.common import make_log
from unimatrix.cli.streams import give_up_stdout, open_streams
from unimatrix.errors import InputError, RunError, explain

_INTERRUPTED = 130


class _PassedOnError(Exception):
    """Carries an error past typer, which would handle it in its own way."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error


@contextlib.contextmanager
def _pass_on() -> Iterator[None]:
    """Hide closed pipes from typer, and EOFError, which typer would take for Ctrl-D at a prompt."""
    try:
        yield
    except (EOFError, BrokenPipeError) as error:
        raise _PassedOnError(error) from error


class _Verbs(TyperGroup):
    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with _pass_on():
            return super().make_context(*args, **kwargs)

    def invoke(self, context: Any) -> Any:
        with _pass_on():
            return super().invoke(context)


app = typer.Typer(
    name="unimatrix",
    cls=_Verbs,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("train")(train.run)
app.command("ask")(ask.run)
app.command("generate")(generate.run)
app.command("eval")(evaluate.run)
app.command("eval-long")(eval_long.run)
app.command("info")(info.run)
app.command("recall")(recall.run)
app.command("compare")(compare.run)
app.command("reproduce")(reproduce.run)
app.command("bench")(bench.run)


def _print_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"unimatrix {unimatrix.__version__}\n")
        raise typer.Exit


@app.callback()
def _accept_global_options(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print it and exit."
        ),
    ] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where in the code an error arose.")
    ] = False,
) -> None:
    """Train and use constant-memory byte-level sequence models.

    The result goes to stdout, progress and log to stderr. Exit codes: 0 done, 1 failed or
    interrupted, 2 unusable input.
    """


def main() -> None:
    """Run the command line and exit with its code."""
    show_traceback = "--traceback" in sys.argv[1:2]
    open_streams()
    code: Any = 0
    try:
        try:
            app()
        except _PassedOnError as passed:
            raise passed.error from None
        except SystemExit as end:
            if isinstance(end.__context__, BrokenPipeError):  # as rich ends, which prints the help
                raise end.__context__ from None
            # Releases of typer differ in the code for Ctrl-C.
            code = 1 if end.code == _INTERRUPTED else end.code
        sys.stdout.flush()
    except BrokenPipeError:
        give_up_stdout()
    except Exception as error:  # The last line of defence: one sentence, never silence.
        if show_traceback:
            raise
        _print_error(_describe(error))
        give_up_stdout()
        code = 2 if isinstance(error, InputError) else 1
    sys.exit(code)


def _describe(error: Exception) -> str:
    """Return an error as one sentence."""
    if isinstance(error, InputError | RunError):
        return str(error)
    sentence = f"{type(error).__name__}: {error}"
    if isinstance(error, OSError) and error.strerror:
        name = "" if error.filename is None else f": {error.filename}"
        sentence = explain(error) + name
    return f"{sentence} (`unimatrix --traceback ...` shows where it arose)"


def _print_error(sentence: str) -> None:
    """Print one sentence on stderr, from the first process of a distributed run only."""
    if "unimatrix.train.processes" in sys.modules:
        from unimatrix.train.processes import is_main_process

        if not is_main_process():
            return
    make_log().print(f"[bold red]error:[/] {escape(sentence)}")
