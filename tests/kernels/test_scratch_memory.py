"""What a kernel takes for itself is its own until it returns."""

import subprocess
import sys

import pytest

# With this threshold glibc takes every block of 16 KiB from the system and gives it back at once: a
# kernel that lets go of its scratch too early touches memory that is not there.
_SCRIPT = """
import ctypes
libc = ctypes.CDLL(None)
assert libc.mallopt(-3, 1 << 14) and libc.mallopt(-1, 1 << 14)
import torch
from unimatrix import UniMatrixConfig, UniMatrixForCausalLM
torch.set_num_threads(2)
for preset in ("core", "sparsepointer", "unimatrix"):
    for scan in ("auto", "parallel"):  # a step as one operator; part after part
        config = UniMatrixConfig.preset(preset, dropout=0.0, max_position_embeddings=None)
        model = UniMatrixForCausalLM(config).train()
        model.set_backend({"matrix_state": scan})
        ids = torch.arange(2 * 300).view(2, 300) % 256
        model(ids, labels=ids, loss_only=True).loss.backward()
        with torch.no_grad():
            model.eval()(ids)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_scratch_outlives_its_last_mention() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", _SCRIPT],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
