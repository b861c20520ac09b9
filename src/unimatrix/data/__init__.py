"""Corpora as byte streams, and samplers that depend on their seed alone."""

from unimatrix.data.byte_stream import ByteStream
from unimatrix.data.corpora import CORPUS_NAMES, Corpus, load_corpus
from unimatrix.data.indexed import IndexedDataset
from unimatrix.data.windows import (
    ConsecutiveWindows,
    DocumentWindows,
    StreamMatches,
    WindowDataset,
)

__all__ = [
    "CORPUS_NAMES",
    "ByteStream",
    "ConsecutiveWindows",
    "Corpus",
    "DocumentWindows",
    "IndexedDataset",
    "StreamMatches",
    "WindowDataset",
    "load_corpus",
]
