"""One split of a corpus: bytes in RAM or mapped from files, read as if they were one array."""

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from unimatrix.errors import InputError
from unimatrix.tokenization import BOS_ID, EOS_ID

JOIN_LIMIT_BYTES = 64 * 2**20
"""Files of at most this many bytes together are read into one array; larger ones are mapped."""
_MAX_OPEN_MAPS = 64  # A map keeps its file open; many systems allow 1,024 or fewer.
_HASH_CHUNK_BYTES = 2**22


class Piece(NamedTuple):
    """A run of bytes inside a file or an array."""

    source: Path | NDArray[np.uint8]
    offset: int
    num_bytes: int


class ByteStream:
    """The bytes of one split; as tokens BOS, the bytes, and EOS where the corpus ends with it.

    Args:
        pieces: what to join, in order; empty pieces are dropped.
        name: what error messages call the stream.
        ends_with_eos: whether the token form ends with EOS.
    """

    def __init__(self, pieces: Sequence[Piece], *, name: str, ends_with_eos: bool = False) -> None:
        self.name = name
        self.ends_with_eos = ends_with_eos
        self._pieces = [piece for piece in pieces if piece.num_bytes]
        sizes = [piece.num_bytes for piece in self._pieces]
        self._borders = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64)
        self._maps: OrderedDict[Path, NDArray[np.uint8]] = OrderedDict()

    @classmethod
    def from_bytes(cls, data: bytes, *, name: str, ends_with_eos: bool = False) -> Self:
        """Make a stream of bytes already at hand."""
        piece = Piece(np.frombuffer(data, np.uint8), 0, len(data))
        return cls([piece], name=name, ends_with_eos=ends_with_eos)

    @classmethod
    def from_files(
        cls, paths: Sequence[Path], *, name: str, join_limit_bytes: int = JOIN_LIMIT_BYTES
    ) -> Self:
        """Make a stream of files, in their order.

        Args:
            paths: regular files.
            name: what error messages call the stream.
            join_limit_bytes: files of at most this many bytes together are read at once, others are
                mapped when a read first touches them.

        Raises:
            InputError: a file cannot be read.
        """
        pieces = [Piece(path, 0, _measure_file(path)) for path in paths]
        stream = cls(pieces, name=name)
        if len(stream) > join_limit_bytes:
            return stream
        return cls([Piece(stream.read(0, len(stream)), 0, len(stream))], name=name)

    def __len__(self) -> int:
        return int(self._borders[-1])

    @property
    def num_tokens(self) -> int:
        """Tokens of the stream: BOS, the bytes, and EOS where it ends with it."""
        return 1 + len(self) + self.ends_with_eos

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Return bytes ``start <= i < stop`` as a new array [stop - start] uint8."""
        assert 0 <= start <= stop <= len(self), (start, stop, len(self))
        result = np.empty(stop - start, np.uint8)
        filled = 0
        for piece in self._cut_pieces(start, stop):
            result[filled : filled + piece.num_bytes] = self._open(piece)
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
            windows = sliding_window_view(self._open(self._pieces[owner]), num_bytes)
            result[rows] = windows[starts[rows] - self._borders[owner]]
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
        return ByteStream(pieces, name=name, ends_with_eos=self.ends_with_eos)

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

    def _open(self, piece: Piece) -> NDArray[np.uint8]:
        array = piece.source if isinstance(piece.source, np.ndarray) else self._map(piece.source)
        view = array[piece.offset : piece.offset + piece.num_bytes]
        if len(view) < piece.num_bytes:
            raise InputError(
                f"{str(piece.source)!r} shrank to {len(array):,} bytes while in use; keep corpus "
                "files as they are during a run."
            )
        return view

    def _map(self, path: Path) -> NDArray[np.uint8]:
        if path in self._maps:
            self._maps.move_to_end(path)
            return self._maps[path]
        if len(self._maps) >= _MAX_OPEN_MAPS:
            self._maps.popitem(last=False)
        try:
            self._maps[path] = np.memmap(path, dtype=np.uint8, mode="r")
        except (OSError, ValueError) as error:
            raise InputError(
                f"cannot map {str(path)!r} ({error}); keep corpus files as they are during a run."
            ) from error
        return self._maps[path]

    def __getstate__(self) -> dict[str, Any]:
        """Leave the open maps behind: a worker process maps the files itself."""
        return {**self.__dict__, "_maps": OrderedDict()}


def _measure_file(path: Path) -> int:
    try:
        with path.open("rb"):
            return path.stat().st_size
    except OSError as error:
        raise InputError(
            f"cannot read {str(path)!r} ({error.strerror}); check its permissions or leave it out."
        ) from error
