"""Named corpora at their sources: the standard library, published archives, datasets."""

import hashlib
import http.client
import importlib
import io
import shutil
import sysconfig
import urllib.request
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from huggingface_hub.constants import HF_HOME
from rich.console import Console
from rich.progress import Progress

from unimatrix.data.compressed import open_file
from unimatrix.data.files import walk
from unimatrix.errors import InputError, explain

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


def find_standard_library(root: Path | None = None) -> dict[str, Path]:
    """List the sources of the running Python's standard library, without its tests.

    The rule: every ``*.py`` below ``sysconfig.get_paths()["stdlib"]``, unless a folder on the way
    is called ``test``, ``tests``, ``idle_test``, ``site-packages`` or ``dist-packages``.

    Returns:
        Files by POSIX path relative to the root, ordered by the SHA-256 of that path.

    Raises:
        InputError: there are no sources, as in some embedded Pythons.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    files = {
        file.relative_to(root).as_posix(): file
        for file in walk(root, skipped=_TEST_FOLDERS | _INSTALLED_FOLDERS)
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
    return hashlib.sha256(relative.encode("utf-8", "surrogateescape")).hexdigest()


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
            with unpacked.open("rb") as file:
                digest = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False))
            if digest.hexdigest() != archive.md5:
                raise OSError(f"its MD5 is {digest.hexdigest()}, not the published {archive.md5}")
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
        raise InputError(
            f"cannot get corpus 'wikitext2' ({explain(error)}); connect to the network, or give a "
            "raw file as --data wikitext2:FILE."
        ) from error


def read_lines(path: Path) -> list[str]:
    """Return the lines of a UTF-8 text file, whatever its line ends are.

    Raises:
        InputError: the file cannot be read or is not UTF-8.
    """
    try:
        with io.TextIOWrapper(open_file(path), encoding="utf-8") as file:
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
