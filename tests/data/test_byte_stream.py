import bz2
import gzip
import hashlib
import lzma
import os
import pickle
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unimatrix.data import ByteStream
from unimatrix.data.byte_stream import Piece
from unimatrix.errors import InputError
from unimatrix.tokenization import BOS_ID, EOS_ID

PARTS = (b"alpha", b"", b"be", b"\x00\xff\xfe", b"g" * 20)
WHOLE = b"".join(PARTS)


def split_at(data, cuts):
    """Make a stream of several arrays, cut at the given places."""
    borders = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    array = np.frombuffer(data, np.uint8)
    pieces = [Piece(array, a, b - a) for a, b in pairwise(borders)]
    return ByteStream(pieces, name="text")


def test_reads_cross_file_borders(open_stream):
    stream = open_stream(*PARTS)
    assert len(stream) == len(WHOLE)
    for start in range(len(WHOLE) + 1):
        for stop in range(start, len(WHOLE) + 1):
            read = stream.read(start, stop)
            assert read.dtype == np.uint8
            assert read.tobytes() == WHOLE[start:stop]


def test_reads_are_copies(open_stream):
    stream = open_stream(*PARTS)
    stream.read(0, 5)[:] = 0
    stream.read_windows(np.array([0]), 5)[:] = 0
    assert stream.read(0, 5).tobytes() == b"alpha"


@given(st.binary(min_size=1, max_size=60), st.lists(st.integers(0, 60), max_size=6), st.data())
@settings(deadline=None)
def test_windows_equal_reads(data, cuts, draw):
    stream = split_at(data, cuts)
    size = draw.draw(st.integers(1, len(data)))
    starts = draw.draw(st.lists(st.integers(0, len(data) - size), max_size=8))
    windows = stream.read_windows(np.array(starts, np.int64), size)
    assert windows.shape == (len(starts), size)
    assert [row.tobytes() for row in windows] == [data[s : s + size] for s in starts]


@given(st.binary(max_size=40), st.booleans(), st.data())
@settings(deadline=None)
def test_token_reads_add_bos_and_eos(data, ends_with_eos, draw):
    stream = ByteStream.from_bytes(data, name="text", ends_with_eos=ends_with_eos)
    tokens = [BOS_ID, *data, *([EOS_ID] if ends_with_eos else [])]
    assert stream.num_tokens == len(tokens)
    start = draw.draw(st.integers(0, len(tokens)))
    stop = draw.draw(st.integers(start, len(tokens)))
    read = stream.read_tokens(start, stop)
    assert read.dtype == np.int64
    assert read.tolist() == tokens[start:stop]
    size = draw.draw(st.integers(1, len(tokens)))
    starts = np.arange(len(tokens) - size + 1)
    windows = stream.read_token_windows(starts, size)
    assert windows.tolist() == [tokens[s : s + size] for s in starts]


def test_slices_share_the_files_and_keep_the_end_token(open_stream):
    stream = open_stream(*PARTS)
    part = stream.slice(3, 9, name="middle")
    assert part.read(0, len(part)).tobytes() == WHOLE[3:9]
    assert part.slice(2, 5, name="inner").read(0, 3).tobytes() == WHOLE[5:8]
    assert part.name == "middle"
    joined = ByteStream.from_bytes(b"abc", name="text", ends_with_eos=True)
    assert joined.slice(0, 2, name="head").read_tokens(0, 4).tolist() == [BOS_ID, 97, 98, EOS_ID]


def test_the_hash_is_of_the_bytes_whatever_the_files_are(open_stream):
    stream = open_stream(*PARTS)
    assert stream.sha256() == hashlib.sha256(WHOLE).hexdigest()
    assert stream.sha256(6) == hashlib.sha256(WHOLE[:6]).hexdigest()
    assert stream.sha256(10**9) == stream.sha256()


def test_the_hash_streams_over_chunks(monkeypatch):
    monkeypatch.setattr("unimatrix.data.byte_stream._HASH_CHUNK_BYTES", 4)
    stream = ByteStream.from_bytes(WHOLE, name="text")
    assert stream.sha256() == hashlib.sha256(WHOLE).hexdigest()
    assert stream.sha256(6) == hashlib.sha256(WHOLE[:6]).hexdigest()


def test_small_files_are_read_once_and_large_ones_stay_on_disk(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(b"before")
    joined = ByteStream.from_files([path], name="text", join_limit_bytes=6)
    mapped = ByteStream.from_files([path], name="text", join_limit_bytes=5)
    path.write_bytes(b"after!")
    assert joined.read(0, 6).tobytes() == b"before"
    assert mapped.read(0, 6).tobytes() == b"after!"


@pytest.mark.skipif(sys.platform == "win32", reason="NTFS files are not sparse by default")
def test_a_file_larger_than_the_machine_is_read_in_pieces(tmp_path):
    num_bytes = 2**37
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(num_bytes)
        file.seek(num_bytes - 4)
        file.write(b"tail")
    stream = ByteStream.from_files([path, path], name="text")
    assert len(stream) == 2 * num_bytes
    assert stream.read(num_bytes - 4, num_bytes + 2).tobytes() == b"tail\0\0"
    starts = np.array([2 * num_bytes - 5, 0, num_bytes - 1])
    assert stream.read_windows(starts, 5).tobytes() == b"\0tail" + bytes(5) + b"l" + bytes(4)


def test_many_files_do_not_exhaust_open_files(tmp_path):
    with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
        paths = [Path(folder, f"{number:03}") for number in range(200)]
        for number, path in enumerate(paths):
            path.write_bytes(bytes([number] * 3))
        stream = ByteStream.from_files(paths, name="text", join_limit_bytes=0)
        expected = b"".join(bytes([number] * 3) for number in range(200))
        assert stream.read(0, 600).tobytes() == expected
        assert stream.read_windows(np.array([597, 0, 299]), 3).tobytes() == (
            expected[597:600] + expected[0:3] + expected[299:302]
        )
        assert len(stream._files) <= 64


def test_streams_travel_to_worker_processes_without_their_open_files(open_stream):
    stream = open_stream(*PARTS)
    stream.read(0, len(stream))
    sent = pickle.loads(pickle.dumps(stream))
    assert not sent._files
    assert sent.read(0, len(sent)).tobytes() == WHOLE


@pytest.mark.parametrize(
    ("left", "named"), [(b"abc", "3 bytes"), (b"", "shrank to 0 bytes"), (None, "No such")]
)
def test_a_file_that_changes_under_a_run_is_an_error(tmp_path, left, named):
    path = tmp_path / "text"
    path.write_bytes(b"0123456789")
    stream = ByteStream.from_files([path], name="text", join_limit_bytes=0)
    path.unlink()
    if left is not None:
        path.write_bytes(left)
    with pytest.raises(InputError, match=named):
        stream.read(0, 10)


@pytest.mark.parametrize("read_at", [True, False])
def test_a_file_that_shrinks_between_two_reads_is_an_error(tmp_path, monkeypatch, read_at):
    if not read_at:  # As on systems without it.
        monkeypatch.delattr(os, "preadv", raising=False)
    path = tmp_path / "text"
    path.write_bytes(b"0123456789" * 1000)
    stream = ByteStream.from_files([path], name="text", join_limit_bytes=0)
    assert stream.read(9990, 10_000).tobytes() == b"0123456789"
    assert stream.read_windows(np.array([9995, 0]), 5).tobytes() == b"5678901234"
    os.truncate(path, 5000)
    assert stream.read(4990, 5000).tobytes() == b"0123456789"
    with pytest.raises(InputError, match="shrank to 5,000 bytes while in use"):
        stream.read(4990, 5001)
    with pytest.raises(InputError, match="shrank to 5,000 bytes while in use"):
        stream.read_windows(np.array([0, 9000]), 5)


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_what_a_compressed_file_holds_is_read_beside_plain_files(tmp_path, pack):
    (tmp_path / "a").write_bytes(b"before ")
    (tmp_path / "b").write_bytes(pack(b"packed"))
    (tmp_path / "c").write_bytes(b" after")
    paths = [tmp_path / name for name in "abc"]
    for limit in (0, 100):
        stream = ByteStream.from_files(paths, name="text", join_limit_bytes=limit)
        assert stream.read(0, len(stream)).tobytes() == b"before packed after"
        assert stream.read_windows(np.array([7, 9]), 6).tobytes() == b"packedcked a"


def test_an_unreadable_file_is_an_error(tmp_path, monkeypatch):
    path = tmp_path / "secret"
    path.write_bytes(b"x")

    def refuse(*args, **options):
        raise PermissionError(13, os.strerror(13))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputError, match=r"secret.*Permission denied.*permissions"):
        ByteStream.from_files([path], name="text")
