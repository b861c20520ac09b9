"""Where the bytes of a corpus come from: files, the standard library, archives, datasets."""

import glob
import hashlib
import http.client
import importlib
import os
import shutil
import sysconfig
import urllib.request
import zipfile
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from huggingface_hub.constants import HF_HOME
from rich.console import Console
from rich.progress import Progress

from unimatrix.errors import InputError, suggest

_TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
_INSTALLED_FOLDERS = frozenset({"site-packages", "dist-packages"})
_DOWNLOAD_TIMEOUT_S = 30


class Archive(NamedTuple):
    """A corpus of one file, published as a zip with one member of the corpus's name."""

    url: str
    num_bytes: int
    md5: str


ARCHIVES = {
    "enwik8": Archive(
        "https://mattmahoney.net/dc/enwik8.zip", 100_000_000, "a1fa5ffddb56f4953e226637dabbb36a"
    ),
    "text8": Archive(
        "https://mattmahoney.net/dc/text8.zip", 100_000_000, "3bea1919949baf155f99411df5fada7e"
    ),
}


def find_files(spec: str, known_names: Iterable[str] = ()) -> list[Path]:
    """List the files that a file name, a folder or a glob stands for.

    A folder is walked to its depth; hidden files and folders (a leading dot) are left out, links to
    folders are not followed. Order: by path relative to the folder, a glob's matches by path.

    Args:
        spec: what the user wrote; a name that exists is taken literally before it is a glob.
        known_names: corpus names to suggest when nothing is found.

    Raises:
        InputError: nothing is found, a folder has no files, or a file is empty or no regular file.
    """
    path = Path(spec).expanduser()
    if path.is_dir():
        return _require_files(_walk(path), f"folder {spec!r} has no files")
    if path.exists():
        return [_check_file(path)]
    if glob.has_magic(spec):
        matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
        found = [
            file for match in matches for file in (_walk(match) if match.is_dir() else [match])
        ]
        files = [file for file in dict.fromkeys(found) if file.is_file()]
        return _require_files(files, f"no file matches {spec!r}")
    beside = [str(entry) for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    names = ", ".join(known_names)
    raise InputError(
        f"{spec!r} is no file, folder, glob or corpus; the corpora are {names}."
        f"{suggest(spec, [*known_names, *beside])}"
    )


def find_file(spec: str) -> Path:
    """Return the one file that a name stands for.

    Raises:
        InputError: there is no such file, or it is a folder, empty or no regular file.
    """
    path = Path(spec).expanduser()
    if not path.exists():
        raise InputError(f"there is no file {spec!r}; check the path.")
    return _check_file(path)


def find_standard_library(root: Path | None = None) -> dict[str, Path]:
    """List the sources of the running Python's standard library, without its tests.

    The rule: every ``*.py`` below ``sysconfig.get_paths()["stdlib"]``, unless a folder on the way
    is called ``test``, ``tests``, ``idle_test``, ``site-packages`` or ``dist-packages``.

    Args:
        root: another folder than the running Python's.

    Returns:
        Files by POSIX path relative to the root, ordered by the SHA-256 of that path.

    Raises:
        InputError: there are no sources, as in some embedded Pythons.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    files = {
        file.relative_to(root).as_posix(): file
        for file in _walk(root, skipped=_TEST_FOLDERS | _INSTALLED_FOLDERS)
        if file.suffix == ".py"
    }
    if not files:
        raise InputError(
            f"this Python has no standard-library sources in {str(root)!r}; run a Python that has "
            "them, or name your own files with --data."
        )
    return {name: files[name] for name in sorted(files, key=hash_path)}


def hash_path(relative: str) -> str:
    """Return the hexadecimal SHA-256 of a relative POSIX path."""
    return hashlib.sha256(relative.encode()).hexdigest()


def fetch_archive(name: str, cache_folder: Path | None = None) -> Path:
    """Return the unpacked file of ``enwik8`` or ``text8``, downloading it the first time.

    Args:
        name: a key of ``ARCHIVES``.
        cache_folder: where it is kept; ``None``: ``unimatrix`` in the Hugging Face cache.

    Raises:
        InputError: the download fails or is not the published file.
    """
    archive = ARCHIVES[name]
    folder = Path(HF_HOME) / "unimatrix" if cache_folder is None else cache_folder
    target = folder / name
    if target.exists():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder) as scratch:
            packed, unpacked = Path(scratch, f"{name}.zip"), Path(scratch, name)
            _download(archive.url, packed)
            with (
                zipfile.ZipFile(packed) as members,
                members.open(name) as source,
                unpacked.open("wb") as sink,
            ):
                shutil.copyfileobj(source, sink)
            _check_md5(unpacked, archive)
            unpacked.replace(target)
    except (OSError, http.client.HTTPException, zipfile.BadZipFile, KeyError) as error:
        raise InputError(
            f"cannot get {name} from {archive.url} ({error}); unzip it yourself and give "
            f"--data {name}:FILE."
        ) from error
    return target


def fetch_wikitext2() -> dict[str, list[str]]:
    """Return the lines of WikiText-2 raw by split: ``train``, ``validation``, ``test``.

    Raises:
        InputError: ``datasets`` is not installed, or cannot get the corpus.
    """
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise InputError(
            "corpus 'wikitext2' needs the datasets library: pip install \"unimatrix-lm[data]\", or "
            "give a raw file as --data wikitext2:FILE."
        ) from error
    try:
        splits = datasets.load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1")
        return {split: list(splits[split]["text"]) for split in ("train", "validation", "test")}
    except (OSError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"cannot get corpus 'wikitext2' ({reason}); connect to the network, or give a raw file "
            "as --data wikitext2:FILE."
        ) from error


def read_lines(path: Path) -> list[str]:
    """Return the lines of a UTF-8 text file, whatever its line ends are.

    Raises:
        InputError: the file cannot be read or is not UTF-8.
    """
    try:
        with path.open(encoding="utf-8") as file:
            return list(file)
    except UnicodeDecodeError as error:
        raise InputError(
            f"{str(path)!r} is not UTF-8 at byte {error.start:,}; give it as --data {path} to take "
            "its bytes as they are."
        ) from error
    except OSError as error:
        raise InputError(
            f"cannot read {str(path)!r} ({error.strerror}); check its permissions."
        ) from error


def _walk(folder: Path, skipped: frozenset[str] = frozenset()) -> list[Path]:
    def refuse(error: OSError) -> None:
        raise InputError(
            f"cannot list {error.filename!r} ({error.strerror}); check its permissions."
        ) from error

    found = []
    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if name not in skipped and name[0] != "."]
        found += [Path(parent, name) for name in names if name[0] != "."]
    files = [file for file in found if file.is_file()]
    return sorted(files, key=lambda file: file.relative_to(folder).as_posix())


def _require_files(files: list[Path], reason: str) -> list[Path]:
    if not files:
        raise InputError(f"{reason}; hidden files do not count, name files with bytes in them.")
    return files


def _check_file(path: Path) -> Path:
    if not path.is_file():
        raise InputError(f"{str(path)!r} is no regular file; save its bytes to a file first.")
    if path.stat().st_size == 0:
        raise InputError(f"{str(path)!r} is empty; give a file with bytes in it.")
    return path


def _download(url: str, target: Path) -> None:
    with (
        urllib.request.urlopen(url, timeout=_DOWNLOAD_TIMEOUT_S) as response,
        Progress(console=Console(stderr=True)) as progress,
        target.open("wb") as sink,
    ):
        total = int(response.headers.get("Content-Length") or 0) or None
        task = progress.add_task(f"downloading {url}", total=total)
        while chunk := response.read(2**18):
            sink.write(chunk)
            progress.advance(task, len(chunk))


def _check_md5(path: Path, archive: Archive) -> None:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if digest != archive.md5:
        raise OSError(f"its MD5 is {digest}, not the published {archive.md5}")
