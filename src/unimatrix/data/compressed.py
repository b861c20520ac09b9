"""Compressed files: a single stream is unpacked, every other format is refused by name."""

import bz2
import gzip
import io
import lzma
import zlib
from pathlib import Path
from typing import BinaryIO, NamedTuple

from unimatrix.errors import InputError

UNPACKED_LIMIT_BYTES = 2**30
"""The most bytes that a compressed file may hold: what it holds is kept in RAM."""
_CHUNK_BYTES = 2**20
_HEAD_BYTES = 512


class _Format(NamedTuple):
    """A file format whose bytes are no text.

    Attributes:
        title: its name in messages, with its article.
        command: what unpacks it.
        marks: byte strings, one of which its files begin with.
        suffixes: the ends of its files' names.
        open: reads it as one stream; ``None`` if the standard library cannot.
        offset: where its marks lie.
    """

    title: str
    command: str
    marks: tuple[bytes, ...]
    suffixes: tuple[str, ...]
    open: type[gzip.GzipFile | bz2.BZ2File | lzma.LZMAFile] | None = None
    offset: int = 0


_TAR_SUFFIXES = (".tar", ".tgz", ".tbz", ".tbz2", ".txz", ".tar.gz", ".tar.bz2", ".tar.xz")
# The first that fits counts: a .tar.gz is a tar archive before it is a gzip stream.
_FORMATS = (
    _Format("a tar archive", "tar -xf", (b"ustar",), _TAR_SUFFIXES, offset=257),
    _Format("a gzip file", "gunzip -k", (b"\x1f\x8b\x08",), (".gz",), gzip.GzipFile),
    _Format(
        "a bzip2 file",
        "bunzip2 -k",
        tuple(b"BZh%d%s" % (n, m) for n in range(1, 10) for m in (b"1AY&SY", b"\x17rE8P\x90")),
        (".bz2",),
        bz2.BZ2File,
    ),
    _Format("an xz file", "unxz -k", (b"\xfd7zXZ\0", b"]\0\0"), (".xz", ".lzma"), lzma.LZMAFile),
    _Format("a Zstandard file", "zstd -d", (b"\x28\xb5\x2f\xfd",), (".zst", ".zstd")),
    _Format(
        "a zip archive (as .docx, .epub, .jar and .npz are)",
        "unzip",
        (b"PK\x03\x04", b"PK\x05\x06"),
        (".zip",),
    ),
    _Format("a 7-Zip archive", "7z x", (b"7z\xbc\xaf\x27\x1c",), (".7z",)),
    _Format("a RAR archive", "unrar x", (b"Rar!\x1a\x07",), (".rar",)),
    _Format("an lz4 file", "lz4 -d", (b"\x04\x22\x4d\x18",), (".lz4",)),
    _Format("an lzip file", "lzip -dk", (b"LZIP\x01",), (".lz",)),
    _Format("an lzop file", "lzop -d", (b"\x89LZO\0",), (".lzo",)),
    _Format("a compress(1) file", "uncompress", (b"\x1f\x9d",), (".Z",)),
    _Format("a Brotli file", "brotli -d", (), (".br",)),
    _Format("a Parquet table", "export its text column", (b"PAR1\x15",), (".parquet",)),
)


def open_file(path: Path) -> BinaryIO:
    """Open a file for its bytes; a single stream of gzip, bzip2, xz or lzma is unpacked.

    Raises:
        InputError: it is an archive or compressed otherwise, is damaged, or holds too much.
        OSError: it cannot be read.
    """
    data = unpack(path)
    return path.open("rb") if data is None else io.BytesIO(data)


def unpack(path: Path) -> bytes | None:
    """Return what a compressed file holds, ``None`` for a file that is not compressed.

    A format is recognised by the first bytes; a name that contradicts them is refused.

    Raises:
        InputError: as in ``open_file``.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    found = _recognise(head)
    if found is None and head:
        _check_name(path)
    if found is None:
        return None
    if found.open is None or _is_tar(path):
        raise _refuse(path, _FORMATS[0] if _is_tar(path) else found)
    data = _read_stream(path, found)
    inner = _recognise(data[:_HEAD_BYTES])
    if inner is not None:
        raise _refuse(path, inner, " inside another file")
    return data


def _recognise(head: bytes) -> _Format | None:
    """Return the format of a file that begins with ``head``, if it is one of these."""
    return next((form for form in _FORMATS if head.startswith(form.marks, form.offset)), None)


def _is_tar(path: Path) -> bool:
    return path.name.lower().endswith(_TAR_SUFFIXES)


def _check_name(path: Path) -> None:
    """Raise ``InputError`` if the name tells a format that the bytes do not have."""
    for form in _FORMATS:
        # .Z is not .z, and old tar archives have no mark.
        if path.name.endswith(form.suffixes) or path.name.lower().endswith(form.suffixes):
            if not form.marks or form.offset:
                raise _refuse(path, form)
            raise InputError(
                f"{str(path)!r} is called {path.suffix} and is not {form.title}; rename it if it "
                "is plain text, else fetch it again."
            )


def _read_stream(path: Path, form: _Format) -> bytes:
    assert form.open is not None
    parts, num_bytes = [], 0
    try:
        with form.open(path) as file:
            while part := file.read(_CHUNK_BYTES):
                parts.append(part)
                num_bytes += len(part)
                if num_bytes > UNPACKED_LIMIT_BYTES:
                    raise InputError(
                        f"{str(path)!r} holds more than {UNPACKED_LIMIT_BYTES:,} bytes; unpack it "
                        f"({form.command}) and give the file that comes out."
                    )
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise InputError(
            f"cannot unpack {str(path)!r}, {form.title} ({error}); it is damaged: fetch it again."
        ) from error
    return b"".join(parts)


def _refuse(path: Path, form: _Format, where: str = "") -> InputError:
    return InputError(
        f"{str(path)!r} is {form.title}{where}, whose bytes are no text; unpack it first "
        f"({form.command}) and give what comes out, or name the other files only."
    )
