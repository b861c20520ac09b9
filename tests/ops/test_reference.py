"""The reference of every operator runs without a compiler."""

import subprocess
import sys

from unimatrix.ops.backends import BACKENDS

RUN_ALL = """
import sys
import torch
from unimatrix.ops.dense_memory import read_dense_memory
from unimatrix.ops.indexed_attention import attend_entries, find_entries
from unimatrix.ops.matrix_state import scan_matrix_state
from unimatrix.ops.selective_slots import (
    empty_selective_slots, hash_contexts, scan_selective_slots,
)
from unimatrix.ops.slots import empty_slots, scan_slots
from unimatrix.ops.suffix_automaton import predict_from_suffix
from unimatrix.ops.text_index import empty_index, search_text

torch.manual_seed(0)
ids = torch.randint(0, 5, (2, 100))
vectors = torch.randn(2, 100, 1, 4)
keys, strengths = torch.randn(2, 100, 4), torch.rand(2, 100)
writable = torch.ones(2, 100, dtype=torch.bool)
options = {"backend": "reference"}
contexts = hash_contexts(ids, [[0, 1], [0]], **options)
found, _ = search_text(ids, initial=empty_index(2, 128, 5, "tokens"), **options)
entries = find_entries(ids, found.places[..., 0], window=128, **options)
done = {
    "matrix_state": scan_matrix_state(
        vectors, vectors, vectors, None, -torch.rand(2, 100, 1), None, **options
    ),
    "slots": scan_slots(
        keys, keys, keys, strengths, ids, writable=writable, slots_per_read=2,
        initial=empty_slots(2, 3, 4, 4), **options,
    ),
    "selective_slots": scan_selective_slots(
        contexts, contexts, ids, 0 * contexts, initial=empty_selective_slots(2, 3, 5), **options
    ),
    "dense_memory": read_dense_memory(
        keys, keys, keys, writable=writable, topk=2, initial=None, **options
    ),
    "suffix_automaton": predict_from_suffix(ids, **options),
    "indexed_attention": attend_entries(
        entries, vectors, torch.randn(2, 200, 1, 4), vectors, torch.randn(2, 100, 1, 80),
        torch.randn(2, 100, 1, 5), torch.randn(1, 17), **options,
    ),
}
assert "numba" not in sys.modules
print(*done)
"""


def test_no_reference_loads_numba() -> None:
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    # What the passes have as their reference is the modules of the model.
    assert {*done.stdout.split(), "fused_passes"} == set(BACKENDS)
