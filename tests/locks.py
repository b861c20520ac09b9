"""Holding a folder from another process, as a run that trains does."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

_PROGRAM = """
import sys
from pathlib import Path
from unimatrix.train.run_folder import hold_folder
with hold_folder(Path(sys.argv[1])):
    print(flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def hold_elsewhere(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Yield a process that holds a folder until the end, or until it is killed."""
    with subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"\n"
        try:
            yield process
        finally:
            process.kill()
