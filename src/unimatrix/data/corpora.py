"""Corpora by one name: what ``--data`` means, and how each is split."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from unimatrix.data.byte_stream import ByteStream
from unimatrix.data.sources import (
    ARCHIVES,
    fetch_archive,
    fetch_wikitext2,
    find_file,
    find_files,
    find_standard_library,
    hash_path,
    read_lines,
)
from unimatrix.errors import InputError

CORPUS_NAMES = ("enwik8", "pystdlib", "text8", "wikitext2")
HELD_OUT_ONE_IN = 20
"""One byte in so many validates, at the end of the user's, when nothing else is given: 5 %."""
HASHED_BYTES = 2**28
"""The bytes of each split, from its start, that a corpus hash covers besides the length."""

Spec = str | os.PathLike[str]


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
) -> Corpus:
    """Open a corpus by name or from files; nothing ever stands in for what was asked for.

    - ``pystdlib``: the running Python's standard-library sources without their tests
      (``find_standard_library`` states the rule), split by the hash of each path.
    - ``wikitext2``: WikiText-2 raw as the paper joins it: non-empty lines, stripped, joined by
      newlines, EOS at the end. ``wikitext2:FILE`` joins a raw file the same way.
    - ``enwik8``, ``text8``: the first 90 % train, then 5 % validate and 5 % test; downloaded the
      first time. ``enwik8:FILE`` and ``text8:FILE`` take a file that is there.
    - anything else: files, folders (every file below, hidden ones apart) and globs, text or binary,
      joined in the order given. Small corpora are read at once, larger ones mapped.

    Args:
        data: one of the above, or several files, folders and globs.
        valid_data: what validates instead: the validation split of a named corpus, or all the bytes
            of anything else. ``None``: the corpus's own split, else the last 5 % of the bytes.
        cache_folder: where downloads are kept; ``None``: ``unimatrix`` in the Hugging Face cache.

    Raises:
        InputError: a corpus is missing, empty, unreadable or too small; the message says how to
            get it.
    """
    source = _open_source(data, cache_folder)
    held_out = None if valid_data is None else _open_source(valid_data, cache_folder)
    if isinstance(held_out, Corpus):
        held_out = held_out.valid
    if isinstance(source, Corpus):
        return source if held_out is None else replace(source, valid=held_out)
    if held_out is None:
        border = len(source) - len(source) // HELD_OUT_ONE_IN
        return _split_in_order(source.name, source, [border, len(source)])
    return Corpus(source.name, source, held_out, None)


def choose_split(relative: str) -> str:
    """Return ``valid`` (1 path in 20), ``test`` (1 in 20) or ``train`` for a POSIX path."""
    return {0: "valid", 1: "test"}.get(int(hash_path(relative), 16) % 20, "train")


def join_lines(lines: Iterable[str]) -> bytes:
    """Join lines as the paper does: strip each, drop the empty ones, newlines between."""
    return "\n".join(line.strip() for line in lines if line.strip()).encode()


def _open_source(data: Spec | Sequence[Spec], cache_folder: Path | None) -> Corpus | ByteStream:
    """Return a corpus that has splits of its own, or else all the bytes as one stream."""
    specs = [os.fspath(s) for s in ([data] if isinstance(data, str | os.PathLike) else data)]
    name, colon, file = specs[0].partition(":") if specs else ("", "", "")
    if len(specs) == 1 and name in CORPUS_NAMES:
        return _open_named(name, file if colon else None, cache_folder)
    named = [spec for spec in specs if spec.partition(":")[0] in CORPUS_NAMES]
    if named:
        raise InputError(f"corpus {named[0]!r} joins no other data; give it alone, or only files.")
    if not specs:
        raise InputError("the list of data is empty; name a corpus, files, folders or globs.")
    title = ", ".join(specs[:3]) + (f" and {len(specs) - 3} more" if len(specs) > 3 else "")
    paths = [path for spec in specs for path in find_files(spec, CORPUS_NAMES)]
    return _require_bytes(ByteStream.from_files(paths, name=title))


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
