"""Keeps compiled kernels on disk, under a key that covers all sources they are made of.

Numba's own key covers the file of a kernel alone. Parts, constants and numbers of columns come from
other files too. So the key here covers the kernel's file and every file of the package that it
imports at its top, directly or through others.
"""
# mypy: allow-untyped-defs

import contextlib
import functools
import hashlib
import logging
import os
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import llvmlite
import numpy as np

from numba.core import config
from numba.core.caching import FunctionCache, IndexDataCacheFile, NullCache

_logger = logging.getLogger("unimatrix")
_PACKAGE = Path(__file__).parents[2]
_IMPORT = re.compile(r"\n(?:from|import) (unimatrix[\w.]*)(?: import (?:\(([^)]*)\)|(.*)))?")
# Settings of Numba that change the machine code and that Numba's own key leaves out.
_SETTINGS = ("OPT", "LOOP_VECTORIZE", "SLP_VECTORIZE", "BOUNDSCHECK")


@functools.cache
def digest_sources(module: str) -> str:
    """Return a hash of a module's file and of every file of the package that it imports.

    Each file is read once: a process runs its sources as they were when it started, so what it
    compiles must not be keyed by a later edit.

    Args:
        module: full name, such as ``unimatrix.ops.slots.native``.
    """
    unread, digests = [module], {}
    while unread:
        name = unread.pop()
        if name not in digests:
            digests[name], imported = _read_module(name)
            unread += imported
    return hashlib.sha256(repr(sorted(digests.items())).encode()).hexdigest()


@functools.cache
def _read_module(name: str) -> tuple[str, tuple[str, ...]]:
    """Return the hash of a module's file and the modules of the package that it imports."""
    path = _find_file(name)
    try:
        source = b"" if path is None else Path(path).read_bytes()
    except OSError:
        source = b""  # an application that is shipped without sources, which nobody edits
    imported = []
    for package, in_brackets, in_line in _IMPORT.findall(source.decode()):
        names = re.findall(r"(\w+)(?: as \w+)?", in_brackets or in_line)
        modules = [f"{package}.{name}" for name in names]
        are_files = [_find_file(module) is not None for module in modules]
        imported += [module for module, is_file in zip(modules, are_files, strict=True) if is_file]
        if not all(are_files) or not modules:
            imported.append(package)
    return hashlib.sha256(source).hexdigest(), tuple(imported)


@functools.cache
def _find_file(module: str) -> str | None:
    """Return the file of a module of the package, ``None`` if it has none."""
    path = os.path.join(_PACKAGE, *module.split(".")[1:])
    files = (f"{path}.py", os.path.join(path, "__init__.py"))
    return next((file for file in files if os.path.isfile(file)), None)


class KernelCache(NullCache):
    """Numba's cache of one function, keyed by all sources; without a folder to write to, none.

    Each signature has files of its own. Numba numbers the signatures of a function in one index,
    which several processes that compile at the same time would write over.

    Raises:
        ImportError: if Numba does not keep its index where this class replaces it.
    """

    def __init__(self, function: Any) -> None:
        self._name = f"{function.__module__}.{function.__name__}"
        self._on_disk: FunctionCache | None = None
        try:
            self._on_disk = FunctionCache(function)
        except RuntimeError:  # no folder can be written
            return
        if not isinstance(self._on_disk._cache_file, IndexDataCacheFile):
            raise ImportError("Numba's cache of compiled functions has no index that is known here")
        versions = [llvmlite.__version__, np.__version__]
        versions += [str(getattr(config, name)) for name in _SETTINGS]
        # Takes the place of Numba's stamp of the function's own file.
        self._stamp = (digest_sources(function.__module__), *versions)

    @property
    def cache_path(self):
        """The folder, ``None`` if there is none."""
        return None if self._on_disk is None else self._on_disk.cache_path

    def load_overload(self, sig, target_context):
        """Return what was compiled for a signature, ``None`` if nothing was, or not whole."""
        compiled = None
        if self._on_disk is not None:
            self._open(sig)
            # A full disk leaves empty files.
            with contextlib.suppress(OSError, EOFError, pickle.UnpicklingError):
                compiled = self._on_disk.load_overload(sig, target_context)
        if compiled is None:
            if not compiled_kernels:
                _say_compiling(self.cache_path)
            compiled_kernels.append(self._name)
        return compiled

    def save_overload(self, sig, data):
        """Keep what was compiled for a signature, where it can be kept."""
        if self._on_disk is None:
            _warn_uncached("no folder for them can be written")
            return
        self._open(sig)
        try:
            self._on_disk.save_overload(sig, data)
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            _warn_uncached(str(error))

    def _open(self, sig: Any) -> None:
        """Let Numba read and write the files of one signature."""
        assert self._on_disk is not None
        number = hashlib.sha256(repr(sig).encode()).hexdigest()[:16]
        self._on_disk._cache_file = IndexDataCacheFile(
            cache_path=self._on_disk.cache_path,
            filename_base=f"{self._on_disk._impl.filename_base}-{number}",
            source_stamp=self._stamp,
        )


compiled_kernels: list[str] = []
"""Names of the kernels that this process compiled, since none that fits was kept."""


def _say_compiling(folder: str | None) -> None:
    """Say why nothing seems to happen, and where the kernels will be."""
    message = "unimatrix compiles its kernels, which takes up to a minute"
    if folder is not None:
        path = Path(folder)
        beside_sources = path.is_relative_to(_PACKAGE)
        place = f"__pycache__ folders of {_PACKAGE}" if beside_sources else str(path.parent)
        message += f" and happens once on this machine; they are kept in {place}"
    _logger.warning(message)


@functools.cache
def _warn_uncached(reason: str) -> None:
    """Say once that every process compiles anew, and how to change that."""
    warnings.warn(
        f"compiled kernels cannot be kept ({reason}), so every process compiles its own, which "
        "takes up to a minute; set NUMBA_CACHE_DIR to a folder that can be written",
        RuntimeWarning,
        stacklevel=2,
    )
