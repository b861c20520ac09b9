import bz2
import functools
import gzip
import io
import lzma
import tarfile
import zipfile

import pytest

from unimatrix.data import compressed, load_corpus
from unimatrix.data.compressed import unpack
from unimatrix.data.sources import read_lines
from unimatrix.errors import InputError

TEXT = b"all that glitters is not gold\n" * 40
# Without the time, so that every process collects the same tests.
gzip_same = functools.partial(gzip.compress, mtime=0)


def make_tar(*, form=tarfile.PAX_FORMAT):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=form) as archive:
        member = tarfile.TarInfo("a.txt")
        member.size = len(TEXT)
        archive.addfile(member, io.BytesIO(TEXT))
    return packed.getvalue()


def make_zip():
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("a.txt", TEXT)
    return packed.getvalue()


@pytest.mark.parametrize(
    ("suffix", "data"),
    [
        ("gz", gzip_same(TEXT)),
        ("gz", gzip_same(TEXT[:99]) + gzip_same(TEXT[99:])),
        ("bz2", bz2.compress(TEXT)),
        ("xz", lzma.compress(TEXT)),
        ("lzma", lzma.compress(TEXT, lzma.FORMAT_ALONE)),
    ],
)
def test_one_stream_is_read_whatever_its_name(write_tree, suffix, data):
    root = write_tree({f"text.{suffix}": data, "plain": data, "lines": data})
    for name in (f"text.{suffix}", "plain"):
        corpus = load_corpus(str(root / name))
        assert (
            corpus.train.read(0, 900).tobytes() + corpus.train.read(900, 1140).tobytes()
        ) == TEXT[:1140]
        assert len(corpus.train) + len(corpus.valid) == len(TEXT)
    assert "".join(read_lines(root / "lines")).encode() == TEXT


@pytest.mark.parametrize(
    ("name", "data", "named"),
    [
        ("a.tar", make_tar(), r"a tar archive, .*unpack it first \(tar -xf\)"),
        ("a", make_tar(form=tarfile.GNU_FORMAT), "a tar archive"),
        ("a.tar.gz", gzip_same(make_tar()), "a tar archive"),
        ("a.tgz", gzip_same(b"old archives have no mark"), "a tar archive"),
        ("a", gzip_same(make_tar()), "a tar archive inside another file"),
        ("a", bz2.compress(gzip_same(TEXT)), "a gzip file inside another file"),
        ("a.docx", make_zip(), r"a zip archive .*\(unzip\)"),
        ("a.txt", make_zip(), "a zip archive"),
        ("a.zst", b"\x28\xb5\x2f\xfdx", r"a Zstandard file, .*\(zstd -d\)"),
        ("a.br", TEXT, "a Brotli file"),
        ("a", b"7z\xbc\xaf\x27\x1cx", "a 7-Zip archive"),
        ("a.parquet", b"PAR1\x15x", "a Parquet table"),
        ("a.gz", TEXT, "is called .gz and is not a gzip file"),
        ("a.XZ", TEXT, "is called .XZ and is not an xz file"),
        ("a.gz", gzip_same(TEXT)[:-9], "cannot unpack .*damaged"),
        ("a.gz", gzip_same(TEXT) + b"more", "cannot unpack .*damaged"),
        ("a.bz2", bz2.compress(TEXT)[:-9], "cannot unpack .*damaged"),
        ("a.xz", lzma.compress(TEXT)[:-40], "cannot unpack .*damaged"),
        ("a.xz", lzma.compress(TEXT)[:20] + bytes(60), "cannot unpack .*damaged"),
    ],
)
def test_everything_else_is_refused_by_its_name(write_tree, name, data, named):
    root = write_tree({f"sub/{name}": data, "sub/b.txt": TEXT})
    for spec in (root / "sub" / name, root / "sub"):
        with pytest.raises(InputError, match=named) as caught:
            load_corpus(str(spec))
        assert "\n" not in str(caught.value)


def test_a_file_that_holds_too_much_is_refused(write_tree, monkeypatch):
    monkeypatch.setattr(compressed, "UNPACKED_LIMIT_BYTES", len(TEXT) - 1)
    root = write_tree({"a.gz": gzip_same(TEXT), "plain": TEXT})
    assert unpack(root / "plain") is None
    with pytest.raises(InputError, match=r"more than 1,199 bytes; unpack it \(gunzip -k\)"):
        unpack(root / "a.gz")
