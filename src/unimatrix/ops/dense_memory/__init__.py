"""Dense associative memory: every earlier (key, value) pair, read by cosine (E5), never dropped."""

from unimatrix.ops.dense_memory.entries import DenseMemory
from unimatrix.ops.dense_memory.read import read_dense_memory

__all__ = ["DenseMemory", "read_dense_memory"]
