"""One run of a cell in a fresh process: does it fit, how long does it take, what does it hold?

A process that runs out of bytes or out of time ends alone, and says nothing about the others.
"""

import contextlib
import copy
import gc
import multiprocessing
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from unimatrix.bench.clock import time_once
from unimatrix.bench.models import BenchModel
from unimatrix.bench.process_bytes import is_out_of_bytes, limit_bytes, measure_peak_bytes
from unimatrix.bench.workloads import MODES, NEW_TOKENS, cut_rows, prefill
from unimatrix.evaluation.footprint import count_cache_bytes
from unimatrix.train.allocator import give_freed_memory_back, keep_freed_memory

# More than a vocabulary has: fewer take another path through some layers, and the run that is
# measured would have kernels left to compile.
_WARMUP_TOKENS = 512
# Loaded before processes start: the compiler of the kernels takes a second to load.
_PRELOADED = tuple(
    f"unimatrix.ops.{op}.native"
    for op in (
        "matrix_state",
        "slots",
        "selective_slots",
        "suffix_automaton",
        "text_index",
        "indexed_attention",
    )
)
_START_LIMIT_S = 300.0


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchCell:
    """One model at one length in one mode.

    Attributes:
        mode: a key of ``MODES``.
        model: which model.
        num_tokens: T; with ``per_token`` modes the tokens before.
        batch_size: B.
    """

    mode: str
    model: BenchModel
    num_tokens: int
    batch_size: int

    def build(self, setting: "Setting") -> PreTrainedModel:
        """Return the model with room for the tokens that are read and written."""
        most = self.num_tokens + 1 + NEW_TOKENS
        return self.model.build(max_tokens=most, seed=setting.seed, device=setting.device)

    def cut_text(self, setting: "Setting", vocab_size: int) -> Tensor:
        """Return the ids that are read, [B, T + 1]."""
        ids = cut_rows(setting.text, self.batch_size, self.num_tokens + 1, vocab_size)
        return ids.to(setting.device)


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """What one run in a fresh process showed.

    Attributes:
        failure: why the cell cannot be timed; ``None`` if it can.
        run_s: seconds of the run.
        peak_bytes: held at most during the run, net; ``None`` where that cannot be known.
        state_bytes: what one sequence carries on after T tokens; ``None`` if reading them took
            longer than the budget.
    """

    failure: str | None = None
    run_s: float = 0.0
    peak_bytes: int | None = None
    state_bytes: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What all cells of a run share.

    Attributes:
        text: at least as many bytes as any cell reads, and one more a row.
        seed: of the weights.
        device: cpu, cuda or mps.
        num_threads: CPU threads.
        budget_s: seconds that one run may take, and that all rounds of a cell may.
    """

    text: bytes
    seed: int
    device: str
    num_threads: int
    budget_s: float


def probe(cell: BenchCell, setting: Setting) -> Probe:
    """Run a cell once in a process of its own.

    The process first takes one step of a copy of the model with few tokens, which compiles and
    loads what the model needs; a model for ``torch.compile`` takes the step itself, since a graph
    is compiled for its sizes. What is measured is the next run, with everything it allocates.
    """
    context = _start_context()
    receiver, sender = context.Pipe(duplex=False)
    text = setting.text[: cell.batch_size * (cell.num_tokens + 1)]
    arguments = (sender, cell, replace(setting, text=text))
    process = context.Process(target=_run_probe, args=arguments, daemon=True)
    process.start()
    sender.close()
    try:
        return _follow(receiver, process, setting.budget_s)
    finally:
        process.kill()
        process.join()
        receiver.close()


def _start_context() -> Any:
    """Return how processes start: where it can be, from one that has loaded the libraries."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *_PRELOADED])
    return context


def _follow(receiver: Connection, process: Any, budget_s: float) -> Probe:
    """Return what the process found, or which of its stages failed.

    Each stage ends with a message. The prompt is that of the modes that continue one.
    """
    found: dict[str, Any] = {}
    for stage, stage_limit_s in (
        ("starting", _START_LIMIT_S),
        ("reading the prompt", budget_s),
        ("one run", budget_s),
        ("state", budget_s),
    ):
        try:
            message = receiver.recv() if receiver.poll(stage_limit_s) else None
        except EOFError:
            process.join()
            message = {"failure": f"its process ended with {process.exitcode}"}
        if stage == "state":
            return Probe(**found, **({} if message is None else message))
        if message is None:
            return Probe(failure=f"{stage} took longer than {stage_limit_s:g} s")
        if "failure" in message:
            return Probe(failure=message["failure"])
        found |= message
    raise AssertionError("the last stage returns")


def _run_probe(sender: Connection, cell: BenchCell, setting: Setting) -> None:
    """Do what ``probe`` says, in the new process; send a message a stage."""
    with contextlib.suppress(OSError):  # Let Linux end this process first if bytes run out.
        Path("/proc/self/oom_score_adj").write_text("1000")
    # Collecting what came with the process would copy all of it.
    gc.freeze()
    logging.set_verbosity_error()
    torch.set_num_threads(setting.num_threads)
    if setting.device == "cpu" and cell.mode == "train":
        keep_freed_memory()  # as training does
    else:
        give_freed_memory_back()
    available = 0
    try:
        available = limit_bytes(setting.device)
        _measure(sender, cell, setting)
    except Exception as error:  # Whatever ends a run is the reason that its row shows.
        failure = f"{type(error).__name__}: {error}".splitlines()[0]
        if is_out_of_bytes(error):
            failure = f"it needs more than the {available / 2**30:.1f} GiB that were free"
        sender.send({"failure": failure})


def _measure(sender: Connection, cell: BenchCell, setting: Setting) -> None:
    """Build, warm up, run, and read the prompt for its state."""
    spec, mode, device = cell.model, MODES[cell.mode], setting.device
    model = cell.build(setting)
    ids = cell.cut_text(setting, model.config.vocab_size)
    workload = None
    if spec.compiler is None:
        few = min(_WARMUP_TOKENS, cell.num_tokens)
        rows = min(-(-_WARMUP_TOKENS // few), cell.batch_size)
        small = replace(cell, num_tokens=few, batch_size=rows)
        short = small.cut_text(setting, model.config.vocab_size)
        time_once(mode.build(spec, copy.deepcopy(model), short), device)
    else:
        workload = mode.build(spec, model, ids)
        time_once(workload, device)
    sender.send({})

    workload = workload or mode.build(spec, model, ids)
    prepared = workload.prepare()
    sender.send({})

    peak_bytes, run_s = measure_peak_bytes(lambda: workload.run(prepared), device)
    sender.send({"run_s": run_s, "peak_bytes": peak_bytes})

    model.eval()
    sender.send({"state_bytes": count_cache_bytes(prefill(spec, model, ids[:1]))})
