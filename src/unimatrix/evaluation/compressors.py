"""What general-purpose compressors reach on the bytes that a model is measured on."""

import importlib
import importlib.util
import lzma
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from unimatrix.data import ByteStream
from unimatrix.errors import InputError

_CHUNK_BYTES = 2**20
_PPMD_ORDER = 8
_PPMD_BYTES, _PPMD_PRIMED_BYTES = 256 * 2**20, 2000 * 2**20
# The smaller PPMd model holds a text up to this size, priming included.
_SMALL_TEXT_BYTES = 2 * 2**20

Measure = Callable[[bytes], float]


class CompressorScore(NamedTuple):
    """Bits per byte of one text.

    Attributes:
        plain: of the text alone.
        primed: that the text adds to the training text before it.
    """

    plain: float
    primed: float


def xz_bits_per_byte(data: bytes) -> float:
    """Return 8 x (size of the ``xz -9e`` file) / (size of the data).

    Args:
        data: at least one byte; xz starts with an empty window, as a model starts at BOS.

    Raises:
        InputError: there are no bytes.
    """
    return _compress([data])


def measure_xz_bits_per_byte(stream: ByteStream, *, limit_bytes: int | None = None) -> float:
    """Return ``xz_bits_per_byte`` of a stream, or of its first ``limit_bytes``, chunk by chunk.

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


def measure_compressors(
    train: bytes, texts: Mapping[str, bytes]
) -> dict[str, dict[str, CompressorScore]]:
    """Compress texts plain and primed, with every compressor that is installed.

    - ``xz -9e``, primed: size of (training text + text) less size of the training text.
    - ``zstd -22`` (package zstandard), primed: the training text is its raw dictionary.
    - ``PPMd`` (package pyppmd; variant I, order 8, 256 MiB, primed 2,000 MiB), primed: as for xz.

    Returns:
        scores by compressor and name of the text, without those of ``list_missing_compressors``.

    Raises:
        InputError: if a text has no bytes; the training text may be empty.

    Cost:
        About 2 minutes for 16 MB of training text; up to 2 GB.
    """
    for name, text in texts.items():
        if not text:
            raise InputError(f"{name} has 0 bytes to compress; give at least 1")
    scores: dict[str, dict[str, CompressorScore]] = {}
    missing = list_missing_compressors()
    for name, (_, prepare) in _COMPRESSORS.items():
        if name in missing:
            continue
        plain, primed = prepare(train, max(map(len, texts.values()), default=0))
        scores[name] = {key: CompressorScore(plain(x), primed(x)) for key, x in texts.items()}
    return scores


def list_missing_compressors() -> dict[str, str]:
    """Return the package that each compressor lacks here, by the compressor's name."""
    return {
        name: package
        for name, (package, _) in _COMPRESSORS.items()
        if package is not None and not _is_installed(package)
    }


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _prime_by_difference(measure: Callable[[bytes], int], train: bytes) -> Measure:
    """Return what a text adds to the compressed size of the training text, in bits per byte."""
    size = measure(train) if train else 0
    return lambda text: 8 * (measure(train + text) - size) / len(text)


def _prepare_xz(train: bytes, _longest: int) -> tuple[Measure, Measure]:
    def measure(text: bytes) -> int:
        return len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))

    return xz_bits_per_byte, _prime_by_difference(measure, train)


def _prepare_zstd(train: bytes, _longest: int) -> tuple[Measure, Measure]:
    zstandard: Any = importlib.import_module("zstandard")
    plain = zstandard.ZstdCompressor(level=22)
    if train:
        prior = zstandard.ZstdCompressionDict(train, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
        prior.precompute_compress(level=22)
        primed = zstandard.ZstdCompressor(level=22, dict_data=prior)
    else:
        primed = plain
    return (
        lambda text: 8 * len(plain.compress(text)) / len(text),
        lambda text: 8 * len(primed.compress(text)) / len(text),
    )


def _prepare_ppmd(train: bytes, longest: int) -> tuple[Measure, Measure]:
    pyppmd: Any = importlib.import_module("pyppmd")
    is_small = len(train) + longest <= _SMALL_TEXT_BYTES
    primed_bytes = _PPMD_BYTES if is_small else _PPMD_PRIMED_BYTES

    def measure(text: bytes, mem_size: int = primed_bytes) -> int:
        return len(pyppmd.compress(text, max_order=_PPMD_ORDER, mem_size=mem_size))

    return (
        lambda text: 8 * measure(text, _PPMD_BYTES) / len(text),
        _prime_by_difference(measure, train),
    )


_COMPRESSORS: Mapping[str, tuple[str | None, Callable[[bytes, int], tuple[Measure, Measure]]]] = {
    "xz -9e": (None, _prepare_xz),
    "zstd -22": ("zstandard", _prepare_zstd),
    "PPMd": ("pyppmd", _prepare_ppmd),
}
