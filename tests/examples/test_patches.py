"""A new update rule and a new mixer touch few files, and then run everywhere.

The patches beside this file are what such a commit holds, without its documents and tests. They
are applied to a copy of the package, in which a model with the new part trains, is causal, and goes
on from a saved cache.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import unimatrix

FOLDER = Path(__file__).parent
MOST_FILES = 6

CHECK = """
import sys, torch
from unimatrix import UniMatrixCache, UniMatrixConfig, UniMatrixForCausalLM
from unimatrix.kernels.plan import explain_plan

torch.manual_seed(0)
preset, changes = sys.argv[1], eval(sys.argv[2])
model = UniMatrixForCausalLM(UniMatrixConfig.preset(preset, dropout=0.0, **changes)).double()
model.set_backend("reference")  # nothing is compiled for the copy
ids = torch.randint(3, 200, (2, 40))
loss = model.train()(ids, labels=ids, loss_only=True).loss
loss.backward()
used = [n for n, p in model.named_parameters() if sys.argv[3] in n]
assert used and all(model.get_parameter(name).grad.abs().sum() > 0 for name in used)

model.eval()
with torch.no_grad():
    whole = model(ids).logits
    changed = ids.clone()
    changed[:, 30:] = 5
    torch.testing.assert_close(model(changed).logits[:, :30], whole[:, :30])
    model(ids[:, :17], use_cache=True).past_key_values.save("cache.safetensors")
    cache = UniMatrixCache.load("cache.safetensors")
    torch.testing.assert_close(model(ids[:, 17:], past_key_values=cache).logits, whole[:, 17:])
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    alone = model(ids[:1, 7:]).logits
    padded = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(padded[:1, 7:], alone)
model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
assert explain_plan(model, 1), "the compiled step does not know it"
print("done", cache.bytes_by_part())
"""


@pytest.mark.parametrize(
    ("patch", "preset", "changes", "parameter"),
    [
        ("new_update_rule", "core", {"update_rules": "gated"}, "gate_proj"),
        ("new_mixer", "average", {}, "average_mixer"),
    ],
)
def test_a_patch_touches_few_files_and_runs(
    tmp_path: Path, patch: str, preset: str, changes: dict[str, object], parameter: str
) -> None:
    text = (FOLDER / f"{patch}.patch").read_text(encoding="utf-8")
    files = re.findall(r"^diff --git a/(\S+)", text, re.MULTILINE)
    assert len(files) <= MOST_FILES
    assert all(name.startswith("src/unimatrix/") for name in files)
    source = Path(unimatrix.__file__).parent
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(source, tmp_path / "src" / "unimatrix", ignore=ignored)
    for command in (["init", "-q"], ["apply", str(FOLDER / f"{patch}.patch")]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    answer = subprocess.run(
        [sys.executable, "-c", CHECK, preset, repr(changes), parameter],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.stdout.startswith("done"), answer.stderr
