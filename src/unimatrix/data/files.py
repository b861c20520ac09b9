"""The files that a name, a folder or a glob stands for, and what is left out of them."""

import glob
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from unimatrix.errors import InputError, suggest

FileKey = tuple[int, int] | str
"""What ``identify`` returns: the numbers of device and file, or else the real path."""
HIDDEN = "hidden"
LINKS = "links to folders"
REPEATS = "files met before"
_SHOWN_PATHS = 3
_VERSION_CONTROL_FOLDERS = frozenset({"CVS", "RCS", "SCCS", "_darcs"})
_BARE_REPOSITORY = frozenset({"HEAD", "objects", "refs"})
_WEIGHT_FILES = frozenset(
    {
        "adapter_model.safetensors",
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
    }
)
_CACHE_TAG, _CACHE_SIGNATURE = "CACHEDIR.TAG", b"Signature: 8a477f597d28d172789f06886806bc55"
_RECORD_FILE, _RECORD_KEY = "record.json", b'"format_version"'


class LeftOut:
    """What a search for files left out, by reason."""

    def __init__(self) -> None:
        self._paths: dict[str, set[str]] = {}

    def add(self, reason: str, path: Path) -> None:
        """Note one file or folder."""
        self._paths.setdefault(reason, set()).add(str(path))

    def describe(self) -> str:
        """Return what was left out as a part of a sentence; empty for nothing."""
        parts = []
        for reason, found in self._paths.items():
            paths = sorted(found)
            more = len(paths) - _SHOWN_PATHS
            shown = ", ".join(paths[:_SHOWN_PATHS]) + (f" and {more} more" if more > 0 else "")
            parts.append(f"{reason} ({shown})")
        return "; ".join(parts)


def find_files(
    spec: str,
    known_names: Iterable[str] = (),
    left_out: LeftOut | None = None,
    *,
    as_before: bool = False,
) -> list[Path]:
    """List the files that a file name, a folder or a glob stands for.

    A folder is walked to its depth, in the order of the paths relative to it. A walk leaves out
    hidden files and folders (a leading dot), links to folders, and what programs write beside a
    text: run folders, saved models, caches, virtual environments, version control. The matches of a
    glob are in the order of their paths; ``**`` leaves the same out but follows links, to each
    folder once. What ``spec`` names itself is always taken.

    Args:
        spec: what the user wrote; a name that exists is taken literally before it is a glob.
        known_names: corpus names to suggest when nothing is found.
        left_out: collects what was left out.
        as_before: leave out hidden files and links only, for runs that began under the first rules.
            ``**`` then follows links as far as the system does, and may list a file several times.

    Raises:
        InputError: nothing is found, a folder has no files, or a file is empty or no regular file.
    """
    left_out = LeftOut() if left_out is None else left_out
    path = Path(spec).expanduser()
    if path.is_dir():
        files = walk(path, left_out, everything=as_before)
        return _require_files(files, f"folder {spec!r} has no files", left_out)
    if path.exists():
        return [_check_file(path)]
    if glob.has_magic(spec):
        if as_before:
            matches = [Path(match) for match in glob.glob(str(path), recursive=True)]
        else:
            matches = _expand_glob(path, left_out)
        found: dict[Path, None] = {}
        for match in sorted(matches, key=str):
            if match.is_dir():
                found |= dict.fromkeys(walk(match, left_out, named=False, everything=as_before))
            else:
                found[match] = None
        files = [file for file in found if file.is_file()]
        return _require_files(files, f"no file matches {spec!r}", left_out)
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


def walk(
    folder: Path,
    left_out: LeftOut | None = None,
    *,
    skipped: frozenset[str] = frozenset(),
    named: bool = True,
    everything: bool = False,
) -> list[Path]:
    """List the regular files below a folder, by POSIX path relative to it.

    Args:
        folder: where to start.
        left_out: collects what was left out.
        skipped: names of folders that are left out and not reported.
        named: the user named the folder itself, so that it is walked whatever it holds.
        everything: leave out hidden files and links only.
    """
    left_out = LeftOut() if left_out is None else left_out
    reached = _reach_folders(folder, left_out, skipped=skipped, named=named, everything=everything)
    found = [parent / name for parent, names in reached for name in names]
    files = [file for file in found if file.is_file()]
    return sorted(files, key=lambda file: file.relative_to(folder).as_posix())


def drop_repeats(paths: Iterable[Path], left_out: LeftOut) -> list[Path]:
    """Return each real file once, under the first name that leads to it."""
    seen, unique = set(), []
    for path in paths:
        key = identify(path)
        if key in seen:
            left_out.add(REPEATS, path)
        else:
            unique.append(path)
        seen.add(key)
    return unique


def identify(path: Path) -> FileKey:
    """Return a key that is equal for all names of one file: links, hard links, other spellings.

    Raises:
        InputError: it is gone or may not be looked at.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise InputError(
            f"cannot read {str(path)!r} ({error.strerror}); check its permissions or leave it out."
        ) from error
    # Some file systems have no numbers of files.
    return (found.st_dev, found.st_ino) if found.st_ino else os.path.realpath(path)


def _expand_glob(pattern: Path, left_out: LeftOut) -> list[Path]:
    """List the files and folders that match; Python's own glob would follow links in circles."""
    found = [Path(pattern.anchor)]
    parts = pattern.parts[bool(pattern.anchor) :]
    for number, part in enumerate(parts, 1):
        if part == "**":
            reached = [
                folder
                for base in found
                if base.is_dir()
                for folder in _reach_folders(base, left_out, follows_links=True)
            ]
            if number < len(parts):
                found = [parent for parent, _ in reached]
            else:
                found = [parent / name for parent, names in reached for name in names]
        elif glob.has_magic(part):
            found = [base / name for base in found for name in glob.glob(part, root_dir=base)]
        else:
            found = [base / part for base in found if (base / part).exists()]
        found = list(dict.fromkeys(found))
    return found


def _reach_folders(
    root: Path,
    left_out: LeftOut,
    *,
    skipped: frozenset[str] = frozenset(),
    named: bool = True,
    everything: bool = False,
    follows_links: bool = False,
) -> Iterator[tuple[Path, list[str]]]:
    """Yield each real folder once, with the names of the files in it."""
    seen: set[FileKey] = set()
    pending = [root]
    for top in pending:  # Grows: links are followed after everything else.
        for parent, folders, names in os.walk(top, onerror=_refuse_unlistable):
            here = Path(parent)
            taken = everything or (named and here == root)
            reason = None if taken else _name_product(here, folders, names)
            if reason is not None:
                left_out.add(reason, here)
            key = identify(here)
            if reason is not None or key in seen:
                folders.clear()
                continue
            seen.add(key)
            for name in (*folders, *names):
                if name[0] == ".":
                    left_out.add(HIDDEN, here / name)
            folders[:] = [name for name in folders if name not in skipped and name[0] != "."]
            links = [here / name for name in folders if (here / name).is_symlink()]
            if follows_links:
                pending += links
            else:
                for link in links:
                    left_out.add(LINKS, link)
            yield here, [name for name in names if name[0] != "."]


def _name_product(folder: Path, folders: Iterable[str], names: Iterable[str]) -> str | None:
    """Return the kind of program output that a folder holds; ``None`` if it may be text."""
    there = {*folders, *names}
    if folder.name == "__pycache__" or _begins_with(folder, _CACHE_TAG, there, _CACHE_SIGNATURE):
        return "caches"
    if folder.name in _VERSION_CONTROL_FOLDERS or there >= _BARE_REPOSITORY:
        return "version control"
    if "pyvenv.cfg" in there:
        return "virtual environments"
    if _begins_with(folder, _RECORD_FILE, there, _RECORD_KEY):
        return "run folders"
    if "metrics.jsonl" in there and there & {"checkpoints", "tensorboard"}:
        return "run folders"  # A run that has just begun has no record yet.
    if there & {"config.json", "adapter_config.json"} and there & _WEIGHT_FILES:
        return "saved models"
    return None


def _begins_with(folder: Path, name: str, there: set[str], mark: bytes) -> bool:
    """Whether a file that is there has ``mark`` among its first bytes."""
    if name not in there or not (folder / name).is_file():
        return False
    try:
        with (folder / name).open("rb") as file:
            return mark in file.read(len(mark) + 16)
    except OSError:
        return False  # The error is reported when the file is opened as text.


def _refuse_unlistable(error: OSError) -> None:
    raise InputError(
        f"cannot list {error.filename!r} ({error.strerror}); check its permissions."
    ) from error


def _require_files(files: list[Path], reason: str, left_out: LeftOut) -> list[Path]:
    if not files:
        passed = left_out.describe()
        raise InputError(
            f"{reason}; name files with bytes in them"
            + (f" (left out here: {passed})." if passed else ".")
        )
    return files


def _check_file(path: Path) -> Path:
    if not path.is_file():
        raise InputError(f"{str(path)!r} is no regular file; save its bytes to a file first.")
    if path.stat().st_size == 0:
        raise InputError(f"{str(path)!r} is empty; give a file with bytes in it.")
    return path
