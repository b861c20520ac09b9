"""Compiled kernels on disk: taken again only if nothing that went in has changed, never needed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from llvmlite.binding import Linkage

import unimatrix
from unimatrix.configuration import PRESETS, UniMatrixConfig
from unimatrix.modeling import UniMatrixForCausalLM
from unimatrix.ops.numba import cache
from unimatrix.ops.numba.cache import KernelCache

# Takes a row of ones through a kernel, one of whose parts lies in another file.
_EMBED = """
import torch
from unimatrix.kernels.passes.embedding_native import embed_tokens_native
print(embed_tokens_native(torch.tensor([1]), torch.ones(2, 8), allows_none=False).mean().item())
"""

# Trains from one step to another, and prints a digest of weights and decoded logits after each.
_TRAIN = """
import hashlib, os, sys, torch
from unimatrix import Decoder, UniMatrixConfig, UniMatrixForCausalLM
from unimatrix.kernels.step.explain import explain_config
torch.set_num_threads(1)
folder, first, last, kernels, *presets = sys.argv[1:]
sizes = dict(hidden_size=64, num_attention_heads=2, head_dim=32, max_position_embeddings=None)
for preset in presets:
    torch.manual_seed(0)
    config = UniMatrixConfig.preset(preset, update_rules="mixed", **sizes)
    model = UniMatrixForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    if int(first):
        saved = torch.load(os.path.join(folder, preset))
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
    for number in range(int(first), int(last)):
        torch.manual_seed(number)
        ids = torch.randint(0, 200, (4, 128))
        optimizer.zero_grad()
        model.train()(ids, labels=ids, loss_only=True).loss.backward()
        optimizer.step()
        digest = hashlib.sha256()
        for parameter in model.parameters():
            digest.update(parameter.detach().numpy().tobytes())
        if kernels == "all":
            cache, is_compiled = None, explain_config(config) is None
            decoder = Decoder(model.eval(), batch_size=2) if is_compiled else None
            for column in ids[:2, :32].T:
                if decoder is not None:
                    logits = decoder.step(column.contiguous())
                else:
                    output = model.eval()(column.unsqueeze(1), past_key_values=cache)
                    logits, cache = output.logits.detach(), output.past_key_values.detach()
                digest.update(logits.numpy().tobytes())
        print(preset, number, digest.hexdigest())
    torch.save((model.state_dict(), optimizer.state_dict()), os.path.join(folder, preset))
"""


# Loads, trains and decodes models, and prints which functions Numba compiled for it.
_FIRST_RUN = """
import sys, torch
from numba.core import event
recorder = event.RecordingListener()
event.register("numba:compile", recorder)
from unimatrix import UniMatrixConfig, UniMatrixForCausalLM
from unimatrix.ops.numba.cache import compiled_kernels
folder, *presets = sys.argv[1:]
ids = torch.arange(2 * 40).view(2, 40) % 256
for preset in presets:
    UniMatrixForCausalLM(UniMatrixConfig.preset(preset)).save_pretrained(folder)
    model = UniMatrixForCausalLM.from_pretrained(folder)
    model.train()(ids, labels=ids).loss.backward()
    model(ids, labels=ids, loss_only=True).loss.backward()
    model.eval()
    with torch.no_grad():
        model(ids)
    for count, sample in ((1, False), (2, False), (1, True)):
        mask = torch.ones_like(ids[:count])
        model.generate(ids[:count], attention_mask=mask, do_sample=sample, max_new_tokens=4)
by_numba = {event.data["dispatcher"].__name__ for _, event in recorder.buffer if event.is_start}
print("compiled:", sorted({name.split(".")[-1] for name in compiled_kernels} | by_numba))
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


def tell_compiling(place: str | Path) -> str:
    """Return the one line that a process prints before it compiles."""
    return (
        "unimatrix compiles its kernels, which takes up to a minute and happens once on this "
        f"machine; they are kept in {place}\n"
    )


def tell_compiling_beside_sources(site: Path) -> str:
    """Return that line where a copy of the package can be written."""
    return tell_compiling(f"__pycache__ folders of {site / 'unimatrix'}")


def list_kept(site: Path) -> list[Path]:
    """Return the files of machine code in a copy of the package."""
    return sorted(site.rglob("*.nbc"))


def close_cache_folders(site: Path) -> None:
    """Leave no place beside the sources where a folder can be made, not even for root."""
    for folder in [path for path in site.rglob("*") if path.is_dir()]:
        (folder / "__pycache__").write_text("in the way")


def test_a_kernel_is_compiled_anew_if_a_part_in_another_file_changes(site: Path) -> None:
    passes = site / "unimatrix" / "kernels" / "passes"
    head = '    """Add a multiple of a row of any width to ``target``."""\n'
    assert (site / "unimatrix/ops/numba/tiles.py").read_text(encoding="utf-8").count(head) == 1
    # The update comes while a process runs that has yet to compile: it runs, and keeps, the old.
    update = f"""
import unimatrix.kernels.passes.embedding_native
from pathlib import Path
part = Path({str(site / "unimatrix/ops/numba/tiles.py")!r})
part.write_text(part.read_text().replace({head!r}, {head!r} + "    factor = 2 * factor\\n"))
"""
    compiling = tell_compiling_beside_sources(site)
    assert run_python(site, update + _EMBED) == compiling + "1.0\n"
    assert run_python(site, _EMBED) == compiling + "2.0\n"

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
    assert said.startswith("unimatrix compiles its kernels, which takes up to a minute\n")
    assert said.count("unimatrix compiles") == 1
    assert said.count("1.0\n") == 2
    assert said.count("set NUMBA_CACHE_DIR to a folder that can be written") == 1
    assert "Traceback" not in said
    folder = site / "elsewhere"
    said = run_python(site, _EMBED, **nowhere, NUMBA_CACHE_DIR=str(folder))
    assert said == tell_compiling(folder) + "1.0\n"
    assert list_kept(folder)


@pytest.mark.skipif(sys.platform == "win32", reason="the system has no such limit")
def test_a_full_disk_leaves_kernels_that_run_and_nothing_half_written(site: Path) -> None:
    # A file of a full disk: no more than the first bytes of it are written.
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))\n"
    said = run_python(site, limit + _EMBED)
    assert "1.0\n" in said
    assert said.count("set NUMBA_CACHE_DIR to a folder that can be written") == 1
    assert not list_kept(site)
    assert run_python(site, _EMBED) == tell_compiling_beside_sources(site) + "1.0\n"
    # What a system that went down leaves: files of no bytes.
    assert list_kept(site)
    for path in site.rglob("*.nb?"):
        path.write_bytes(b"")
    said = run_python(site, _EMBED)
    assert "1.0\n" in said
    assert "Traceback" not in said


def assert_resumed_is_unbroken(site: Path, folder: Path, kernels: str, *presets: str) -> None:
    """Assert that the process that compiles, and those that load, compute the same bits."""
    said = run_python(site, _TRAIN, folder, 0, 2, kernels, *presets)
    compiling = tell_compiling_beside_sources(site)
    assert said.count(compiling) == 1
    begun = said.replace(compiling, "").splitlines()
    resumed = run_python(site, _TRAIN, folder, 2, 3, kernels, *presets).splitlines()
    unbroken = run_python(site, _TRAIN, folder, 0, 3, kernels, *presets).splitlines()
    assert sorted(begun + resumed) == sorted(unbroken)
    assert len(unbroken) == 3 * len(presets)


def test_a_numba_with_another_index_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numba's own key would be taken, and a kernel outlive the sources of its parts."""
    monkeypatch.setattr(cache, "IndexDataCacheFile", int)
    with pytest.raises(ImportError, match="has no index that is known here"):
        KernelCache(list_kept)


def test_no_kernel_lets_another_call_its_parts() -> None:
    """What one kernel is given must not depend on which others were loaded before it."""
    config = UniMatrixConfig.preset("core", hidden_size=64, max_position_embeddings=None)
    ids = torch.arange(80).view(2, 40)
    UniMatrixForCausalLM(config)(ids, labels=ids, loss_only=True).loss.backward()
    names = [name for name in sys.modules if name.startswith("unimatrix.") and "native" in name]
    functions = [value for name in names for value in vars(sys.modules[name]).values()]
    kernels = [one for one in functions if isinstance(getattr(one, "_cache", 0), KernelCache)]
    compiled = [
        (one, result) for one in kernels for result in getattr(one, "overloads", {}).values()
    ]
    assert len(compiled) > 5
    for one, result in compiled:
        module = result.library._get_module_for_linking()
        exported = [f.name for f in module.functions if f.linkage == Linkage.linkonce_odr]
        # Numba up to 0.61 exports these, whose names hold a digest of what they do.
        exported = [name for name in exported if not name.startswith("__excinfo_unwrap_args")]
        assert exported, one
        assert all(f"{one.__name__}B" in name for name in exported), (one, exported)


def test_a_second_process_compiles_nothing(tmp_path: Path) -> None:
    """Beside this package, so that what other tests compile is compiled once."""
    source = Path(unimatrix.__file__).parents[1]
    run_python(source, _FIRST_RUN, tmp_path, "core", "unimatrix", "sparsepointer")
    said = run_python(source, _FIRST_RUN, tmp_path, "core", "unimatrix", "sparsepointer")
    assert said.splitlines()[-1] == "compiled: []"
    assert "unimatrix compiles" not in said


@pytest.mark.slow
def test_the_first_run_of_all_is_the_only_one_that_compiles(site: Path, tmp_path: Path) -> None:
    first = run_python(site, _FIRST_RUN, tmp_path, *PRESETS)
    assert first.count(tell_compiling_beside_sources(site)) == 1
    assert "'advance'" in first.splitlines()[-1]
    second = run_python(site, _FIRST_RUN, tmp_path, *PRESETS)
    assert second.splitlines()[-1] == "compiled: []"
    assert "unimatrix compiles" not in second


@pytest.mark.slow
def test_the_first_run_of_all_resumed_is_the_unbroken_one(site: Path, tmp_path: Path) -> None:
    assert_resumed_is_unbroken(site, tmp_path, "train", "core")


@pytest.mark.slow
def test_every_preset_trains_and_decodes_alike_in_a_process_that_compiles(
    site: Path, tmp_path: Path
) -> None:
    assert_resumed_is_unbroken(site, tmp_path, "all", *PRESETS)
