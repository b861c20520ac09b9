"""What every test shares: no surprise from threads, deadlines or the terminal."""

import os

import torch
from hypothesis import settings

if not torch.cuda.is_available():
    # Read when Triton is imported: its kernels then run on the CPU, one program after another.
    os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile("unimatrix", deadline=None, derandomize=True)
settings.load_profile("unimatrix")

if "PYTEST_XDIST_WORKER" in os.environ:
    # Several workers share the cores; one thread each.
    torch.set_num_threads(1)
