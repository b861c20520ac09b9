"""Compiled kernels on disk: taken again only if nothing that went in has changed, never needed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import unimatrix

# Takes a row of ones through a kernel, one of whose parts lies in another file.
_EMBED = """
import torch
from unimatrix.ops.fused_passes.embedding_native import embed_tokens_native
print(embed_tokens_native(torch.tensor([1]), torch.ones(2, 8), allows_none=False).mean().item())
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """Return a folder that holds a copy of the package, nothing compiled."""
    source = Path(unimatrix.__file__).parent
    folder = tmp_path / "site"
    shutil.copytree(source, folder / "unimatrix", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def run_python(site: Path, code: str, *arguments: object, **variables: str) -> str:
    """Return what a new process prints, both streams."""
    given = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=given | {"PYTHONPATH": str(site)} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def list_kept(site: Path) -> list[Path]:
    """Return the files of machine code in a copy of the package."""
    return sorted(site.rglob("*.nbc"))


def close_cache_folders(site: Path) -> None:
    """Leave no place beside the sources where a folder can be made, not even for root."""
    for folder in [path for path in site.rglob("*") if path.is_dir()]:
        (folder / "__pycache__").write_text("in the way")


def test_a_kernel_is_compiled_anew_if_a_part_in_another_file_changes(site: Path) -> None:
    passes = site / "unimatrix" / "ops" / "fused_passes"
    head = '    """Add a multiple of a row to ``target``; of any width."""\n'
    assert (passes / "tiles_native.py").read_text(encoding="utf-8").count(head) == 1
    # The update comes while a process runs that has yet to compile: it runs, and keeps, the old.
    update = f"""
import unimatrix.ops.fused_passes.embedding_native
from pathlib import Path
part = Path({str(passes / "tiles_native.py")!r})
part.write_text(part.read_text().replace({head!r}, {head!r} + "    factor = 2 * factor\\n"))
"""
    assert run_python(site, update + _EMBED) == "1.0\n"
    assert run_python(site, _EMBED) == "2.0\n"

    # A file that no kernel here imports is of no account.
    before = [path.stat().st_mtime_ns for path in list_kept(site)]
    with (passes / "head_native.py").open("a", encoding="utf-8") as file:
        file.write("\nTOLERANCE = 2\n")
    assert run_python(site, _EMBED) == "2.0\n"
    assert [path.stat().st_mtime_ns for path in list_kept(site)] == before


@pytest.mark.skipif(sys.platform == "win32", reason="a home is found otherwise there")
def test_without_a_place_to_keep_kernels_they_run_and_a_warning_says_once_how(site: Path) -> None:
    close_cache_folders(site)
    nowhere = {"HOME": "/dev/null", "XDG_CACHE_HOME": "/dev/null/cache"}
    twice = _EMBED + _EMBED.replace("8", "9").replace(
        "torch.ones(2, 9)", "torch.ones(2, 9).double()"
    )
    said = run_python(site, twice, **nowhere)
    assert said.count("1.0\n") == 2
    assert said.count("set NUMBA_CACHE_DIR to a folder that can be written") == 1
    assert "Traceback" not in said
    folder = site / "elsewhere"
    assert run_python(site, _EMBED, **nowhere, NUMBA_CACHE_DIR=str(folder)) == "1.0\n"
    assert list_kept(folder)


@pytest.mark.skipif(sys.platform == "win32", reason="the system has no such limit")
def test_a_full_disk_leaves_kernels_that_run_and_nothing_half_written(site: Path) -> None:
    # A file of a full disk: no more than the first bytes of it are written.
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))\n"
    said = run_python(site, limit + _EMBED)
    assert "1.0\n" in said
    assert said.count("set NUMBA_CACHE_DIR to a folder that can be written") == 1
    assert not list_kept(site)
    assert run_python(site, _EMBED) == "1.0\n"
    # What a system that went down leaves: files of no bytes.
    assert list_kept(site)
    for path in site.rglob("*.nb?"):
        path.write_bytes(b"")
    said = run_python(site, _EMBED)
    assert "1.0\n" in said
    assert "Traceback" not in said
