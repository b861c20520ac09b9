"""The exceptions of this package: what the caller passed cannot be used, or the work failed."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """A value from outside that cannot be used.

    The message is one sentence that names the value received and the fix. The command line prints
    it without a traceback and exits with status 2.
    """


class RunError(RuntimeError):
    """Work that could not be finished, and no fault of the code.

    The message is one sentence that says what is left of the work. The command line prints it
    without a traceback and exits with status 1.
    """


class WriteError(RunError):
    """A file that could not be written, such as on a full disk."""


def explain(error: BaseException) -> str:
    """Return what an error says, on one line; of a system call, what the system says."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror[0].lower() + error.strerror[1:]
    return (str(error).splitlines() or [type(error).__name__])[0]


def suggest(name: str, known: Iterable[str], *, likeness: float = 0.5) -> str:
    """Return ``" Did you mean 'x'?"`` for the known name nearest to ``name``, or ``""``.

    Names further than ``likeness``, of 1 for the same, are not proposed.
    """
    nearest = difflib.get_close_matches(name, list(known), n=1, cutoff=likeness)
    return f" Did you mean {nearest[0]!r}?" if nearest else ""


def require_choice(subject: str, value: object, known: Iterable[str]) -> None:
    """Raise ``InputError`` unless ``value`` is among those known.

    Args:
        subject: how the message begins, such as ``unknown preset`` or ``schedule is``.
        value: what was received.
        known: what there is to choose from, in the order to show.
    """
    known = tuple(known)
    if value not in known:
        raise InputError(
            f"{subject} {value!r}; choose one of {', '.join(known)}.{suggest(str(value), known)}"
        )
