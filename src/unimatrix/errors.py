"""The one exception that means: what the caller passed cannot be used."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """A value from outside that cannot be used.

    The message is one sentence that names the value received and the fix. The command line prints
    it without a traceback and exits with status 2.
    """


def suggest(name: str, known: Iterable[str], *, likeness: float = 0.5) -> str:
    """Return ``" Did you mean 'x'?"`` for the known name nearest to ``name``, or ``""``.

    Names further than ``likeness``, of 1 for the same, are not proposed.
    """
    nearest = difflib.get_close_matches(name, list(known), n=1, cutoff=likeness)
    return f" Did you mean {nearest[0]!r}?" if nearest else ""
