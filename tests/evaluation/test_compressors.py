import lzma
import random

import pytest

from unimatrix.data import ByteStream
from unimatrix.errors import InputError
from unimatrix.evaluation import compressors
from unimatrix.evaluation.compressors import measure_xz_bits_per_byte, xz_bits_per_byte

TEXT = b"".join(b"line %d of many, much like the others\n" % (i * i % 97) for i in range(400))


def test_counts_the_whole_file_of_xz_9e() -> None:
    expected = 8 * len(lzma.compress(TEXT, preset=9 | lzma.PRESET_EXTREME)) / len(TEXT)
    assert xz_bits_per_byte(TEXT) == expected
    assert expected < 1


def test_noise_costs_a_little_more_than_8_bits() -> None:
    assert 8 < xz_bits_per_byte(random.Random(0).randbytes(20_000)) < 8.1


@pytest.mark.parametrize("chunk_bytes", [1, 7, 1000, 2**20])
def test_a_stream_in_chunks_costs_the_same(monkeypatch, chunk_bytes) -> None:
    monkeypatch.setattr(compressors, "_CHUNK_BYTES", chunk_bytes)
    stream = ByteStream.from_bytes(TEXT, name="text")
    assert measure_xz_bits_per_byte(stream) == xz_bits_per_byte(TEXT)
    assert measure_xz_bits_per_byte(stream, limit_bytes=999) == xz_bits_per_byte(TEXT[:999])
    assert measure_xz_bits_per_byte(stream, limit_bytes=10**9) == xz_bits_per_byte(TEXT)


def test_nothing_to_compress() -> None:
    with pytest.raises(InputError, match="0 bytes"):
        xz_bits_per_byte(b"")
    with pytest.raises(InputError, match="0 bytes"):
        measure_xz_bits_per_byte(ByteStream.from_bytes(b"", name="text"))
