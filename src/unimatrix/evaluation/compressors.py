"""The bar that a byte-level model has to beat: a general-purpose compressor on the same bytes."""

import lzma
from collections.abc import Iterable

from unimatrix.data import ByteStream
from unimatrix.errors import InputError

_CHUNK_BYTES = 2**20


def xz_bits_per_byte(data: bytes) -> float:
    """Return 8 x (size of the ``xz -9e`` file) / (size of the data).

    Args:
        data: at least one byte; xz starts with an empty window, as a model starts at BOS.

    Raises:
        InputError: there are no bytes.
    """
    return _compress([data])


def measure_xz_bits_per_byte(stream: ByteStream, *, limit_bytes: int | None = None) -> float:
    """Return ``xz_bits_per_byte`` of a stream, without holding it all.

    Args:
        stream: what to compress.
        limit_bytes: compress the first so many bytes only; ``None`` is all.

    Raises:
        InputError: there are no bytes.

    Cost:
        About 1 s a megabyte; up to 700 MB for xz's window, whatever the length.
    """
    num_bytes = len(stream) if limit_bytes is None else min(limit_bytes, len(stream))
    return _compress(
        stream.read(start, min(start + _CHUNK_BYTES, num_bytes)).tobytes()
        for start in range(0, num_bytes, _CHUNK_BYTES)
    )


def _compress(chunks: Iterable[bytes]) -> float:
    compressor = lzma.LZMACompressor(preset=9 | lzma.PRESET_EXTREME)
    num_bytes = compressed_bytes = 0
    for chunk in chunks:
        num_bytes += len(chunk)
        compressed_bytes += len(compressor.compress(chunk))
    if num_bytes == 0:
        raise InputError("there are 0 bytes to compress; give at least 1")
    return 8 * (compressed_bytes + len(compressor.flush())) / num_bytes
