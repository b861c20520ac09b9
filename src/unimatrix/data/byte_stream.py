"""One split of a corpus: bytes in RAM or in files, read as if they were one array."""

import hashlib
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from unimatrix.data.compressed import unpack
from unimatrix.errors import InputError
from unimatrix.tokenization import BOS_ID, EOS_ID

JOIN_LIMIT_BYTES = 64 * 2**20
"""Files of at most this many bytes together are read into one array; larger ones stay on disk."""
_MAX_OPEN_FILES = 64  # Many systems allow 1,024 or fewer.
_HASH_CHUNK_BYTES = 2**22


class Piece(NamedTuple):
    """A run of bytes inside a file or an array."""

    source: Path | NDArray[np.uint8]
    offset: int
    num_bytes: int


class ByteStream:
    """The bytes of one split; its tokens are BOS, the bytes, and EOS if the corpus ends with it.

    Args:
        pieces: what to join, in order; empty pieces are dropped.
        name: what error messages call the stream.
        ends_with_eos: whether the token form ends with EOS.
        starts: bytes at which documents start, rising from 0; ``None``: each piece is a document.

    Attributes:
        document_starts: [n] int64, the byte at which each document (a file) starts.
    """

    def __init__(
        self,
        pieces: Sequence[Piece],
        *,
        name: str,
        ends_with_eos: bool = False,
        starts: NDArray[np.int64] | None = None,
    ) -> None:
        self.name = name
        self.ends_with_eos = ends_with_eos
        self._pieces = [piece for piece in pieces if piece.num_bytes]
        sizes = [piece.num_bytes for piece in self._pieces]
        self._borders = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64)
        self.document_starts = self._borders[:-1] if starts is None else starts
        self._files: OrderedDict[Path, _OpenFile] = OrderedDict()

    @classmethod
    def from_bytes(cls, data: bytes, *, name: str, ends_with_eos: bool = False) -> Self:
        """Make a stream of bytes already at hand."""
        piece = Piece(np.frombuffer(data, np.uint8), 0, len(data))
        return cls([piece], name=name, ends_with_eos=ends_with_eos)

    @classmethod
    def from_files(
        cls,
        paths: Sequence[Path],
        *,
        name: str,
        join_limit_bytes: int = JOIN_LIMIT_BYTES,
        unpacks: bool = True,
    ) -> Self:
        """Make a stream of files, in their order.

        Args:
            paths: regular files; gzip, bzip2, xz and lzma are unpacked into RAM.
            name: what error messages call the stream.
            join_limit_bytes: files of at most this many bytes together are read now, larger ones
                piece by piece when their bytes are read.
            unpacks: ``False`` takes the bytes of compressed files and archives as they are.

        Raises:
            InputError: a file cannot be read, is an archive or is compressed otherwise.
        """
        stream = cls([_open_piece(path, unpacks=unpacks) for path in paths], name=name)
        if len(stream) > join_limit_bytes:
            return stream
        joined = Piece(stream.read(0, len(stream)), 0, len(stream))
        return cls([joined], name=name, starts=stream.document_starts)

    def __len__(self) -> int:
        return int(self._borders[-1])

    @property
    def num_tokens(self) -> int:
        """Tokens of the stream, BOS and EOS included."""
        return 1 + len(self) + self.ends_with_eos

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Return bytes ``start <= i < stop`` as a new array [stop - start] uint8."""
        assert 0 <= start <= stop <= len(self), (start, stop, len(self))
        result = np.empty(stop - start, np.uint8)
        filled = 0
        for piece in self._cut_pieces(start, stop):
            self._copy(piece, result[filled : filled + piece.num_bytes])
            filled += piece.num_bytes
        return result

    def read_windows(self, starts: NDArray[np.int64], num_bytes: int) -> NDArray[np.uint8]:
        """Return ``num_bytes`` bytes from each start, as a new array [n, num_bytes] uint8."""
        assert starts.size == 0 or (starts.min() >= 0 and starts.max() + num_bytes <= len(self))
        result = np.empty((len(starts), num_bytes), np.uint8)
        owners = np.searchsorted(self._borders, starts, side="right") - 1
        whole = starts + num_bytes <= self._borders[owners + 1]
        for owner in np.unique(owners[whole]):
            rows = np.flatnonzero(whole & (owners == owner))
            piece = self._pieces[owner]
            offsets = starts[rows] - self._borders[owner] + piece.offset
            if isinstance(piece.source, np.ndarray):
                result[rows] = sliding_window_view(piece.source, num_bytes)[offsets]
                continue
            for row, offset in zip(rows, offsets.tolist(), strict=True):
                self._copy(Piece(piece.source, offset, num_bytes), result[row])
        for row in np.flatnonzero(~whole):
            result[row] = self.read(int(starts[row]), int(starts[row]) + num_bytes)
        return result

    def read_tokens(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return tokens ``start <= i < stop`` as a new array [stop - start] int64."""
        assert 0 <= start <= stop <= self.num_tokens, (start, stop, self.num_tokens)
        result = np.empty(stop - start, np.int64)
        first, last = (min(max(token - 1, 0), len(self)) for token in (start, stop))
        result[first + 1 - start : last + 1 - start] = self.read(first, last)
        if start == 0 < stop:
            result[0] = BOS_ID
        if self.ends_with_eos and start < stop == self.num_tokens:
            result[-1] = EOS_ID
        return result

    def read_token_windows(self, starts: NDArray[np.int64], num_tokens: int) -> NDArray[np.int64]:
        """Return ``num_tokens`` tokens from each start, as a new array [n, num_tokens] int64."""
        result = np.empty((len(starts), num_tokens), np.int64)
        inner = (starts > 0) & (starts - 1 + num_tokens <= len(self))
        result[inner] = self.read_windows(starts[inner] - 1, num_tokens)
        for row in np.flatnonzero(~inner):
            result[row] = self.read_tokens(int(starts[row]), int(starts[row]) + num_tokens)
        return result

    def slice(self, start: int, stop: int, *, name: str) -> "ByteStream":
        """Return bytes ``start <= i < stop`` as a stream of their own, without copying."""
        assert 0 <= start <= stop <= len(self), (start, stop, len(self))
        pieces = list(self._cut_pieces(start, stop))
        inside = self.document_starts[
            (self.document_starts > start) & (self.document_starts < stop)
        ]
        starts = np.concatenate([[0], inside - start]).astype(np.int64)[: stop - start]
        return ByteStream(pieces, name=name, ends_with_eos=self.ends_with_eos, starts=starts)

    def sha256(self, limit: int | None = None) -> str:
        """Return the hexadecimal SHA-256 of the bytes, or of the first ``limit`` of them."""
        stop = len(self) if limit is None else min(limit, len(self))
        digest = hashlib.sha256()
        for start in range(0, stop, _HASH_CHUNK_BYTES):
            digest.update(self.read(start, min(start + _HASH_CHUNK_BYTES, stop)).data)
        return digest.hexdigest()

    def _cut_pieces(self, start: int, stop: int) -> Iterator[Piece]:
        first = int(np.searchsorted(self._borders, start, side="right")) - 1
        for index in range(first, len(self._pieces)):
            border = int(self._borders[index])
            if border >= stop:
                return
            source, offset, num_bytes = self._pieces[index]
            skipped = max(start - border, 0)
            yield Piece(source, offset + skipped, min(stop - border, num_bytes) - skipped)

    def _copy(self, piece: Piece, into: NDArray[np.uint8]) -> None:
        """Copy a piece to ``into``, of its length.

        Files are read, not mapped: a mapped file that another program cuts short kills the process
        (SIGBUS), which no check before a read can prevent.
        """
        source, offset, num_bytes = piece
        if isinstance(source, np.ndarray):
            into[:] = source[offset : offset + num_bytes]
            return
        filled = 0
        try:
            file = self._open(source)
            while filled < num_bytes:
                found = file.read(offset + filled, into[filled:])
                if found == 0:
                    break
                filled += found
        except OSError as error:
            raise InputError(
                f"cannot read {str(source)!r} ({error.strerror}); keep corpus files as they are "
                "during a run."
            ) from error
        if filled < num_bytes:
            raise InputError(
                f"{str(source)!r} shrank to {file.num_bytes:,} bytes while in use; keep "
                "corpus files as they are during a run."
            )

    def _open(self, path: Path) -> "_OpenFile":
        if path in self._files:
            self._files.move_to_end(path)
            return self._files[path]
        if len(self._files) >= _MAX_OPEN_FILES:
            self._files.popitem(last=False)
        self._files[path] = _OpenFile(path)
        return self._files[path]

    def __getstate__(self) -> dict[str, Any]:
        """Drop the open files: a worker process opens its own."""
        return {**self.__dict__, "_files": OrderedDict()}


class _OpenFile:
    """A file open for reading at any place; closed with the last reference to it."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))

    @property
    def num_bytes(self) -> int:
        """Its length now."""
        return os.fstat(self._descriptor).st_size

    def read(self, offset: int, into: NDArray[np.uint8]) -> int:
        """Read as many bytes as are there and fit; return how many, 0 past the end."""
        if hasattr(os, "preadv"):
            # Processes that were forked share the position that a seek would move.
            return os.preadv(self._descriptor, [into.data], offset)
        os.lseek(self._descriptor, offset, os.SEEK_SET)
        data = os.read(self._descriptor, len(into))
        into[: len(data)] = np.frombuffer(data, np.uint8)
        return len(data)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)


def _open_piece(path: Path, *, unpacks: bool) -> Piece:
    try:
        data = unpack(path) if unpacks else None
        if data is not None:
            return Piece(np.frombuffer(data, np.uint8), 0, len(data))
        return Piece(path, 0, path.stat().st_size)
    except OSError as error:
        raise InputError(
            f"cannot read {str(path)!r} ({error.strerror}); check its permissions or leave it out."
        ) from error
