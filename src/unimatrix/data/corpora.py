"""Corpora by name: the meaning of ``--data``, and how each corpus is split."""

import glob
import hashlib
import logging
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from unimatrix.data.byte_stream import ByteStream
from unimatrix.data.files import FileKey, LeftOut, drop_repeats, find_file, find_files, identify
from unimatrix.data.sources import (
    ARCHIVES,
    fetch_archive,
    fetch_wikitext2,
    find_standard_library,
    hash_path,
    read_lines,
)
from unimatrix.errors import InputError

CORPUS_NAMES = ("enwik8", "pystdlib", "text8", "wikitext2")
HELD_OUT_ONE_IN = 20
"""One byte in so many validates, at the end of the user's, when nothing else is given: 5 %."""
FILE_RULES = 2
"""Version of the rules by which files are found and read; a record without it is of version 1."""
HASHED_BYTES = 2**28
"""The bytes of each split, from its start, that a corpus hash covers besides the length."""

_NUM_PROBES, _PROBE_BYTES = 64, 2**12
# Bits per byte after deflate; a JPEG has 7.9, machine code 5, text 4 or less.
_RANDOM_BITS_PER_BYTE = 7.8
_RANDOM_SHARE = 0.05

Spec = str | os.PathLike[str]
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Corpus:
    """Training, validation and test text under one name."""

    name: str
    """What the user called it."""
    train: ByteStream
    """What is trained on."""
    valid: ByteStream
    """What is validated on."""
    test: ByteStream | None
    """What is tested on; ``None`` where the corpus has no such split."""

    @cached_property
    def sha256(self) -> str:
        """Hexadecimal SHA-256 over each split's name, length and first 256 MiB; lazy."""
        digest = hashlib.sha256()
        for split, stream in (("train", self.train), ("valid", self.valid), ("test", self.test)):
            if stream is not None:
                digest.update(f"{split} {len(stream)} {stream.sha256(HASHED_BYTES)}\n".encode())
        return digest.hexdigest()


def load_corpus(
    data: Spec | Sequence[Spec],
    valid_data: Spec | Sequence[Spec] | None = None,
    *,
    cache_folder: Path | None = None,
    as_before: bool = False,
) -> Corpus:
    """Open a corpus by name or from files, exactly what was asked for or not at all.

    - ``pystdlib``: the running Python's standard-library sources without their tests
      (``find_standard_library`` states the rule), split by the hash of each path.
    - ``wikitext2``: WikiText-2 raw as the paper joins it: non-empty lines, stripped, joined by
      newlines, EOS at the end. ``wikitext2:FILE`` joins a raw file the same way.
    - ``enwik8``, ``text8``: the first 90 % train, then 5 % validate and 5 % test; downloaded the
      first time. ``enwik8:FILE`` and ``text8:FILE`` take a file that is there.
    - anything else: files, folders and globs (``find_files`` states what they leave out), text or
      binary, each real file once, joined in the order given. Files of gzip, bzip2, xz and lzma
      count as what they hold; archives are refused. Small corpora are read at once, larger ones
      piece by piece.

    If a file or folder here has the name of a corpus, ``./NAME`` is the file, ``NAME:`` is the
    corpus, and the bare name is refused. This module's logger warns of files that were left out, of
    validation text that is trained on, and of bytes that do not compress at all.

    Args:
        data: one of the above, or several files, folders and globs.
        valid_data: what validates instead: the validation split of a named corpus, or all the bytes
            of anything else. ``None``: the corpus's own split, else the last 5 % of the bytes.
        cache_folder: where downloads are kept; ``None``: ``unimatrix`` in the Hugging Face cache.
        as_before: list files as runs did that began under the first rules (``find_files``), and
            read compressed files as they are.

    Raises:
        InputError: a corpus is missing, empty, unreadable or too small; the message says how to
            get it.
    """
    specs = list_specs(data)
    source, files = _open_source(specs, cache_folder, as_before)
    if valid_data is None:
        if isinstance(source, Corpus):
            return source
        return hold_out_end(source)
    held_out = source
    if list_specs(valid_data) != specs:
        held_out, valid_files = _open_source(list_specs(valid_data), cache_folder, as_before)
        if shared := name_shared(valid_files, files):
            _logger.warning("%s: both trained on and validated on", shared)
    valid = held_out.valid if isinstance(held_out, Corpus) else held_out
    if isinstance(source, Corpus):
        return replace(source, valid=valid)
    return Corpus(source.name, source, valid, None)


def list_specs(data: Spec | Sequence[Spec]) -> list[str]:
    """Return the value of ``--data`` as a list of strings."""
    return [os.fspath(s) for s in ([data] if isinstance(data, str | os.PathLike) else data)]


def find_corpus_files(specs: Sequence[str]) -> dict[FileKey, Path]:
    """Return the real files of a corpus by their keys (``identify``); none for a named corpus."""
    if _is_named(specs):
        return {}
    return {identify(path): path for path in _find_paths(specs, LeftOut())}


def make_absolute(specs: Iterable[str]) -> tuple[str, ...]:
    """Return specs that mean the same in every working folder; corpora keep their names."""
    return tuple(map(_make_absolute, specs))


def load_stored_corpus(
    data: Iterable[str], valid_data: Iterable[str] | None = None, *, as_before: bool = False
) -> Corpus:
    """Open the data that a run stored, where a corpus's name is never a file that lies here."""
    stored = (name_explicitly(data), name_explicitly(valid_data or ()))
    return load_corpus(stored[0], stored[1] or None, as_before=as_before)


def name_explicitly(specs: Iterable[str]) -> list[str]:
    """Return specs in which the name of a corpus cannot be mistaken for a file."""
    return [f"{spec}:" if spec in CORPUS_NAMES else spec for spec in specs]


def hold_out_end(stream: ByteStream) -> Corpus:
    """Return a stream as a corpus whose last 5 % validate.

    Raises:
        InputError: the last 5 % are less than a byte.
    """
    border = len(stream) - len(stream) // HELD_OUT_ONE_IN
    return _split_in_order(stream.name, stream, [border, len(stream)])


def choose_split(relative: str) -> str:
    """Return ``valid`` (1 path in 20), ``test`` (1 in 20) or ``train`` for a POSIX path."""
    return {0: "valid", 1: "test"}.get(int(hash_path(relative), 16) % 20, "train")


def join_lines(lines: Iterable[str]) -> bytes:
    """Join lines as the paper does: strip each, drop the empty ones, newlines between."""
    return "\n".join(line.strip() for line in lines if line.strip()).encode()


class _Source(NamedTuple):
    """What was opened: a corpus with splits of its own or all the bytes, and the real files."""

    content: Corpus | ByteStream
    files: dict[FileKey, Path]


def _open_source(specs: list[str], cache_folder: Path | None, as_before: bool) -> _Source:
    if not specs:
        raise InputError("the list of data is empty; name a corpus, files, folders or globs.")
    for spec in specs:
        _require_unambiguous(spec)
    if _is_named(specs):
        name, _, file = specs[0].partition(":")
        return _Source(_open_named(name, file or None, cache_folder), {})
    named = [spec for spec in specs if spec.partition(":")[0] in CORPUS_NAMES]
    if named:
        raise InputError(f"corpus {named[0]!r} joins no other data; give it alone, or only files.")
    title = ", ".join(specs[:3]) + (f" and {len(specs) - 3} more" if len(specs) > 3 else "")
    if as_before:
        paths = [path for spec in specs for path in find_files(spec, CORPUS_NAMES, as_before=True)]
        stream = ByteStream.from_files(paths, name=title, unpacks=False)
        return _Source(_require_bytes(stream), {})
    left_out = LeftOut()
    paths = _find_paths(specs, left_out)
    if listing := left_out.describe():
        _logger.warning("left out of %s: %s", title, listing)
    stream = _require_bytes(ByteStream.from_files(paths, name=title))
    _warn_of_random_bytes(stream)
    return _Source(stream, {identify(path): path for path in paths})


def _is_named(specs: Sequence[str]) -> bool:
    return len(specs) == 1 and specs[0].partition(":")[0] in CORPUS_NAMES


def _find_paths(specs: Iterable[str], left_out: LeftOut) -> list[Path]:
    found = [path for spec in specs for path in find_files(spec, CORPUS_NAMES, left_out)]
    return drop_repeats(found, left_out)


def _require_unambiguous(spec: str) -> None:
    """Raise ``InputError`` for the name of a corpus that is also a file or folder here."""
    name, _, file = spec.partition(":")
    path = Path(spec)
    if name not in CORPUS_NAMES or spec == f"{name}:" or not path.exists():
        return
    kind = "folder" if path.is_dir() else "file"
    split = f", {name}:{spec} for that file, split as {name} is" if name in ARCHIVES else ""
    raise InputError(
        f"{spec!r} is a corpus and also a {kind} here; write ./{spec} for the {kind}"
        + (split if kind == "file" and not file else "")
        + (f", or {name}: for the corpus." if not file else ".")
    )


def _make_absolute(spec: str) -> str:
    name, _, file = spec.partition(":")
    if name in CORPUS_NAMES:
        return f"{name}:{_make_absolute(file)}" if file else name
    path = Path(spec).expanduser()
    here = Path.cwd()
    if glob.has_magic(spec) and not path.exists():
        here = Path(glob.escape(str(here)))
    return str(here / path)


def name_shared(files: Mapping[FileKey, Path], others: Mapping[FileKey, Path]) -> str:
    """Return the names of the files that are among others too, the first and how many more."""
    shared = [str(path) for key, path in files.items() if key in others]
    return "".join(shared[:1]) + (f" and {len(shared) - 1} more" if shared[1:] else "")


def _warn_of_random_bytes(stream: ByteStream) -> None:
    """Warn of a stream in which deflate saves nothing, judged by pieces from all over it."""
    if len(stream) < _PROBE_BYTES:
        return
    starts = range(0, len(stream) - _PROBE_BYTES + 1, max(1, len(stream) // _NUM_PROBES))
    sizes = [len(zlib.compress(stream.read(start, start + _PROBE_BYTES).data)) for start in starts]
    share = sum(8 * size / _PROBE_BYTES > _RANDOM_BITS_PER_BYTE for size in sizes) / len(sizes)
    if share > _RANDOM_SHARE:
        _logger.warning(
            "about %.0f %% of the bytes of %s are at nearly 8 bits a byte, compressed or random: a "
            "model learns nothing from them; give what they hold, or name the other files only",
            100 * share,
            stream.name,
        )


def _open_named(name: str, file: str | None, cache_folder: Path | None) -> Corpus | ByteStream:
    if name == "pystdlib":
        if file is not None:
            raise InputError(f"pystdlib takes no file, got {file!r}; write --data pystdlib.")
        return _open_standard_library()
    if name == "wikitext2" and file is None:
        return _open_wikitext2()
    if name == "wikitext2":
        title = f"wikitext2:{file}"
        joined = join_lines(read_lines(find_file(str(file))))
        return _require_bytes(ByteStream.from_bytes(joined, name=title, ends_with_eos=True))
    return _open_archive(
        name, fetch_archive(name, cache_folder) if file is None else find_file(file)
    )


def _open_standard_library() -> Corpus:
    paths: dict[str, list[Path]] = {"train": [], "valid": [], "test": []}
    for relative, path in find_standard_library().items():
        paths[choose_split(relative)].append(path)
    train, valid, test = (
        ByteStream.from_files(paths[split], name=f"pystdlib ({split})") for split in paths
    )
    return Corpus("pystdlib", train, valid, test)


def _open_wikitext2() -> Corpus:
    lines = fetch_wikitext2()
    train, valid, test = (
        ByteStream.from_bytes(
            join_lines(lines[split]), name=f"wikitext2 ({split})", ends_with_eos=True
        )
        for split in ("train", "validation", "test")
    )
    return Corpus("wikitext2", train, valid, test)


def _open_archive(name: str, path: Path) -> Corpus:
    stream = ByteStream.from_files([path], name=name)
    expected = ARCHIVES[name].num_bytes
    if len(stream) != expected:
        raise InputError(
            f"{str(path)!r} has {len(stream):,} bytes but {name} has {expected:,}; unzip "
            f"{ARCHIVES[name].url} anew."
        )
    return _split_in_order(name, stream, [expected * 9 // 10, expected * 19 // 20, expected])


def _split_in_order(name: str, stream: ByteStream, ends: Sequence[int]) -> Corpus:
    """Cut a stream at ``ends`` into training, validation and, with a third end, test text."""
    starts = [0, *ends[:-1]]
    parts = [
        _require_bytes(stream.slice(start, end, name=f"{name} ({split})"))
        for split, start, end in zip(("train", "valid", "test"), starts, ends, strict=False)
    ]
    return Corpus(name, parts[0], parts[1], parts[2] if len(parts) > 2 else None)


def _require_bytes(stream: ByteStream) -> ByteStream:
    if len(stream) == 0:
        raise InputError(
            f"{stream.name!r} has no bytes; give more text, or validation text with --valid-data."
        )
    return stream
