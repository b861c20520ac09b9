"""From nothing to the first token: a new process imports, loads a checkpoint and generates."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unimatrix.bench.clock import choose_rounds, summarize
from unimatrix.bench.models import BenchModel

_PROMPT_TOKENS = 64
# Where compilers look for what they have compiled.
_CACHES = ("NUMBA_CACHE_DIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
_LIMIT_S = 600.0
# What every model here needs of the two libraries is imported first: transformers loads its parts
# when they are asked for. The streamer is told of the prompt, then of each token.
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
told = []
class Streamer:
    def put(self, ids):
        told.append(time.perf_counter() - libraries)
    def end(self):
        pass
ids = torch.arange(int(num_tokens), device=device).unsqueeze(0) % int(vocab_size)
mask = torch.ones_like(ids)
with torch.autocast(device, getattr(torch, precision), enabled=precision != "float32"):
    model.generate(ids, attention_mask=mask, max_new_tokens=2, do_sample=False, streamer=Streamer())
print(json.dumps({"libraries": libraries - begun, "first": told[1], "second": told[2]}))
"""


class StartError(RuntimeError):
    """A new process did not get as far as its first tokens."""


def time_starts(
    specs: Sequence[BenchModel],
    *,
    num_rounds: int,
    budget_s: float,
    seed: int,
    device: str,
    precision: str,
    num_threads: int,
) -> list[dict[str, Any]]:
    """Time new processes up to the first token of a checkpoint, the models in turn.

    Args:
        specs: presets and peers; compiled ones are left out.
        num_rounds: processes a model, after one that compiles its kernels, if they fit the budget.
        budget_s: seconds that all processes of a model may take.
        seed: of the weights.
        device: cpu, cuda or mps.
        precision: of matrix products, a key of ``DTYPES``.
        num_threads: CPU threads.

    Returns:
        a row a model, as JSON types: why it cannot run here; or seconds that torch and transformers
        take to import, seconds from there to the first and to the second token, which is the first
        that continues a cache, and the same of the first process ever, whose kernels are not
        compiled.

    Raises:
        StartError: if a process fails, with its last line.
    """
    specs = [spec for spec in specs if spec.compiler is None]
    absences = {spec.label: spec.explain_absence(_PROMPT_TOKENS + 2, device) for spec in specs}
    with tempfile.TemporaryDirectory() as folder:
        # A place for its compiled kernels, where none are yet.
        kernels = {spec.label: Path(folder) / f"kernels of {spec.label}" for spec in specs}
        commands = {}
        for spec in specs:
            if absences[spec.label] is not None:
                continue
            model = spec.build(max_tokens=_PROMPT_TOKENS + 2, seed=seed, device="cpu")
            model.save_pretrained(Path(folder) / spec.label)
            sizes = (num_threads, _PROMPT_TOKENS, model.config.vocab_size)
            kind = type(model)
            commands[spec.label] = [
                *(sys.executable, "-c", _SCRIPT, kind.__module__, kind.__name__),
                *(str(Path(folder) / spec.label), device, precision, *map(str, sizes)),
            ]
        first_ever = {label: _run(command, kernels[label]) for label, command in commands.items()}
        rounds = {label: [_run(command, kernels[label])] for label, command in commands.items()}
        for index in range(1, num_rounds):
            for label, command in commands.items():
                if index < choose_rounds(num_rounds, budget_s, rounds[label][0]["whole"]):
                    rounds[label].append(_run(command, kernels[label]))
    return [
        {"model": label, "skipped": absence}
        if absence is not None
        else _make_row(label, first_ever[label], rounds[label])
        for label, absence in absences.items()
    ]


def _run(command: list[str], kernels: Path) -> dict[str, float]:
    """Return what a process says and how long it took, its compiled kernels kept in a folder."""
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
    said: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return said | {"whole": time.perf_counter() - begun}


def _make_row(
    label: str, first_ever: dict[str, float], rounds: list[dict[str, float]]
) -> dict[str, Any]:
    """Return a model's row."""
    libraries, first, second = (
        summarize([said[name] for said in rounds]) for name in ("libraries", "first", "second")
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
