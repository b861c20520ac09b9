"""The ``unimatrix`` command: its verbs, and how an error becomes one sentence and an exit code.

Exit codes: 0 done, 1 failed or interrupted, 2 unusable input.
"""

import sys
from typing import Annotated

import typer
from rich.markup import escape

import unimatrix
from unimatrix.cli import (
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
from unimatrix.errors import InputError

_INTERRUPTED = 130

app = typer.Typer(
    name="unimatrix",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("train")(train.run)
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
    try:
        app()
    except SystemExit as end:
        # Releases of typer differ in the code for Ctrl-C.
        sys.exit(1 if end.code == _INTERRUPTED else end.code)
    except InputError as error:
        if show_traceback:
            raise
        _print_error(str(error))
        sys.exit(2)
    except Exception as error:  # The last line of defence: one sentence, never silence.
        if show_traceback:
            raise
        _print_error(
            f"{type(error).__name__}: {error} (`unimatrix --traceback ...` shows where it arose)"
        )
        sys.exit(1)


def _print_error(sentence: str) -> None:
    """Print one sentence on stderr, from the first process of a distributed run only."""
    if "unimatrix.processes" in sys.modules:
        from unimatrix.processes import is_main_process

        if not is_main_process():
            return
    make_log().print(f"[bold red]error:[/] {escape(sentence)}")
