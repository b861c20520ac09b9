import lzma
import random

import pytest

from unimatrix.data import ByteStream
from unimatrix.errors import InputError
from unimatrix.evaluation import compressors
from unimatrix.evaluation.compressors import (
    list_missing_compressors,
    measure_compressors,
    measure_xz_bits_per_byte,
    xz_bits_per_byte,
)

TEXT = b"".join(b"line %d of many, much like the others\n" % (i * i % 97) for i in range(400))
NOISE = random.Random(1).randbytes(3000)


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


def test_every_installed_compressor_gains_from_priming() -> None:
    scores = measure_compressors(TEXT, {"again": TEXT[:3000], "noise": NOISE})
    assert set(scores) == {"xz -9e", "zstd -22", "PPMd"} - set(list_missing_compressors())
    assert scores["xz -9e"]["again"].plain == xz_bits_per_byte(TEXT[:3000])
    for name, by_text in scores.items():
        assert by_text["again"].primed < 0.5 * by_text["again"].plain, name
        assert 7.9 < by_text["noise"].primed < 8.6, name


def test_xz_primed_is_what_the_text_adds() -> None:
    def size(text: bytes) -> int:
        return len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))

    score = measure_compressors(TEXT, {"noise": NOISE})["xz -9e"]["noise"]
    assert score.primed == 8 * (size(TEXT + NOISE) - size(TEXT)) / len(NOISE)


def test_without_training_text_primed_is_plain() -> None:
    for by_text in measure_compressors(b"", {"text": TEXT}).values():
        assert by_text["text"].primed == by_text["text"].plain


def test_a_missing_package_is_named(monkeypatch) -> None:
    monkeypatch.setattr(compressors, "_is_installed", lambda package: False)
    assert list_missing_compressors() == {"zstd -22": "zstandard", "PPMd": "pyppmd"}
    assert set(measure_compressors(b"", {"text": TEXT})) == {"xz -9e"}


def test_ppmd_is_the_default_variant_of_order_8() -> None:
    pyppmd = pytest.importorskip("pyppmd", reason="the extra compare is not installed")
    expected = 8 * len(pyppmd.compress(TEXT, max_order=8, mem_size=2**28)) / len(TEXT)
    assert measure_compressors(b"", {"text": TEXT})["PPMd"]["text"].plain == expected


def test_an_empty_text_is_named() -> None:
    with pytest.raises(InputError, match="test has 0 bytes"):
        measure_compressors(TEXT, {"test": b""})
