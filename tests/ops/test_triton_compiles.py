"""Triton's kernels through its compiler, down to a GPU's own code; no GPU is needed for that."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_every_kernel_compiles(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    ours = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-m", "tests.ops.compile_triton"],
        env={**os.environ, **ours},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.splitlines()) == 54
