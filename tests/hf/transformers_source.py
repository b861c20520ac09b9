"""Fetches transformers' source distribution, whose tests its wheel lacks, and imports some of them.

``python -m tests.hf.transformers_source`` fetches what belongs to the installed release.
"""

import importlib
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import transformers

NAME = f"transformers-{transformers.__version__}"
FOLDER = Path(__file__).parents[2] / "build"
SOURCE = FOLDER / NAME
# What the tests import and the distribution lacks; both hold tests, and here none.
ABSENT = {
    "exporters.test_export": "ExportTesterMixin",
    "generation.test_utils": "GenerationTesterMixin",
}


def fetch() -> None:
    """Download the source distribution of the installed release, and unpack it."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(FOLDER)]
    command += ["--no-binary", "transformers", f"transformers=={transformers.__version__}"]
    subprocess.run(command, check=True)
    with tarfile.open(FOLDER / f"{NAME}.tar.gz") as archive:
        archive.extractall(FOLDER, filter="data")


def import_tests(name: str) -> Any:
    """Import a module of its tests, under another name than that of this project's."""
    if not (SOURCE / "tests" / f"{name}.py").is_file():
        pytest.skip(
            f"needs the tests of {NAME}; fetch them with: python -m tests.hf.transformers_source",
            allow_module_level=True,
        )
    pytest.importorskip("parameterized", reason="transformers' tests need parameterized")
    package = ModuleType("transformers_tests")
    package.__path__ = [str(SOURCE / "tests")]
    sys.modules[package.__name__] = package
    for module_name, class_name in ABSENT.items():
        module = ModuleType(f"{package.__name__}.{module_name}")
        setattr(module, class_name, type(class_name, (), {}))
        sys.modules[module.__name__] = module
    return importlib.import_module(f"{package.__name__}.{name}")


if __name__ == "__main__":
    fetch()
