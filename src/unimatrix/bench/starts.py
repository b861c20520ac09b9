"""From nothing to the first token: a new process imports, loads a checkpoint and generates."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from unimatrix.bench.clock import choose_rounds, summarize
from unimatrix.bench.plan import BenchPlan

_PROMPT_TOKENS = 64
# Folders in which compilers keep what they compile.
_CACHES = ("NUMBA_CACHE_DIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
_LIMIT_S = 600.0
# The time starts once both libraries are imported, and the parts of transformers that all models
# use, which are loaded on first use. The streamer gets the prompt first, then each token.
_SCRIPT = """
import importlib, json, sys, time
begun = time.perf_counter()
import torch
from transformers import GenerationMixin, PreTrainedModel
libraries = time.perf_counter()
module, name, folder, device, precision, num_threads, num_tokens, vocab_size = sys.argv[1:]
torch.set_num_threads(int(num_threads))
model = getattr(importlib.import_module(module), name).from_pretrained(folder).to(device).eval()
model.generation_config.eos_token_id = None
times = []
class Streamer:
    def put(self, ids):
        times.append(time.perf_counter() - libraries)
    def end(self):
        pass
ids = torch.arange(int(num_tokens), device=device).unsqueeze(0) % int(vocab_size)
mask = torch.ones_like(ids)
with torch.autocast(device, getattr(torch, precision), enabled=precision != "float32"):
    model.generate(ids, attention_mask=mask, max_new_tokens=2, do_sample=False, streamer=Streamer())
print(json.dumps({"libraries": libraries - begun, "first": times[1], "second": times[2]}))
"""


class StartError(RuntimeError):
    """A new process did not get as far as its first tokens."""


def time_starts(plan: BenchPlan) -> list[dict[str, Any]]:
    """Time new processes up to the first token of a checkpoint, the models in turn.

    Args:
        plan: whose models these are; compiled ones are left out. Its rounds are processes a model,
            after one that compiles the model's kernels.

    Returns:
        a row a model, as JSON types: why it cannot run here; or seconds that torch and transformers
        take to import, seconds from there to the first and to the second token, which is the first
        that continues a cache, and the same of the first process ever, whose kernels are not
        compiled.

    Raises:
        StartError: if a process fails, with its last line.
    """
    specs = [spec for spec in plan.models if spec.compiler is None]
    most_tokens, device = _PROMPT_TOKENS + 2, plan.device
    absences = {spec.label: spec.explain_absence(most_tokens, device) for spec in specs}
    with tempfile.TemporaryDirectory() as folder:
        processes = {}
        for spec in specs:
            if absences[spec.label] is not None:
                continue
            model = spec.build(max_tokens=most_tokens, seed=plan.seed, device="cpu")
            model.save_pretrained(Path(folder) / spec.label)
            sizes = (torch.get_num_threads(), _PROMPT_TOKENS, model.config.vocab_size)
            kind = type(model)
            command = [
                *(sys.executable, "-c", _SCRIPT, kind.__module__, kind.__name__),
                *(str(Path(folder) / spec.label), device, plan.precision, *map(str, sizes)),
            ]
            # Each model has an empty folder for its compiled kernels.
            processes[spec.label] = command, Path(folder) / f"kernels of {spec.label}"
        first_ever = {label: _run(*process) for label, process in processes.items()}
        rounds = {label: [_run(*process)] for label, process in processes.items()}
        for index in range(1, plan.num_rounds):
            for label, process in processes.items():
                whole_s = rounds[label][0]["whole"]
                if index < choose_rounds(plan.num_rounds, plan.budget_s, whole_s):
                    rounds[label].append(_run(*process))
    return [
        {"model": label, "skipped": absence}
        if absence is not None
        else _make_row(label, first_ever[label], rounds[label])
        for label, absence in absences.items()
    ]


def _run(command: list[str], kernels: Path) -> dict[str, float]:
    """Return the seconds that a process prints, and how long all of it took.

    Its compiled kernels are kept in the folder ``kernels``.
    """
    environment = {**os.environ, **dict.fromkeys(_CACHES, str(kernels))}
    begun = time.perf_counter()
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=_LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise StartError(f"a new process took longer than {_LIMIT_S:g} s") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"]
        raise StartError(f"a new process could not generate: {lines[-1]}")
    seconds: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return seconds | {"whole": time.perf_counter() - begun}


def _make_row(
    label: str, first_ever: dict[str, float], rounds: list[dict[str, float]]
) -> dict[str, Any]:
    """Return a model's row."""
    libraries, first, second = (
        summarize([seconds[name] for seconds in rounds])
        for name in ("libraries", "first", "second")
    )
    return {
        "model": label,
        "skipped": None,
        "rounds": first.rounds,
        "libraries_s": libraries.median,
        "first_token_s": first.median,
        "fastest_s": first.fastest,
        "slowest_s": first.slowest,
        "second_token_s": second.median,
        "first_ever_first_token_s": first_ever["first"],
        "first_ever_second_token_s": first_ever["second"],
    }
