"""One run of a cell in a fresh process: does it fit, how long does it take, what does it hold?

A process that runs out of bytes or out of time ends alone, and says nothing about the others.
"""

import contextlib
import copy
import gc
import multiprocessing
from collections.abc import Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from unimatrix.bench.clock import time_once
from unimatrix.bench.models import BenchModel
from unimatrix.bench.peak_bytes import measure_peak_bytes
from unimatrix.bench.workloads import MODES, NEW_TOKENS, count_cache_bytes, cut_rows, prefill
from unimatrix.train.allocator import give_freed_memory_back, keep_freed_memory

# With fewer, some kernels would be compiled in the run that is measured: what layers make of tokens
# alone they make of the vocabulary where a batch has more tokens than that.
_WARMUP_TOKENS = 512
_BYTES_SHARE = 0.8
# Their compiler takes a second to load, which every process would spend again.
_PRELOADED = tuple(
    f"unimatrix.ops.{op}.native"
    for op in ("matrix_state", "slots", "selective_slots", "suffix_automaton")
)
_START_LIMIT_S = 300.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
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


def probe(cell: Cell, setting: Setting) -> Probe:
    """Run a cell once in a process of its own.

    The process first takes one step of a copy of the model with few tokens (a compiled model the
    step itself), which compiles and loads what the model needs; what is measured is the next run,
    with everything it allocates.

    Args:
        cell: what to run.
        setting: shared by all cells.
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
    """Return how processes are started: from one that has loaded the libraries, where there is."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *_PRELOADED])
    return context


def _follow(receiver: Connection, process: Any, budget_s: float) -> Probe:
    """Return what the process found, or which of its stages failed.

    The stages, each announced by a message when it is over: starting, reading the prompt (of the
    modes that continue one), the run, and the state.
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


def _run_probe(sender: Connection, cell: Cell, setting: Setting) -> None:
    """Do what ``probe`` says, in the new process; send a message a stage."""
    _volunteer_for_the_killer()
    # Collecting what came with the process would copy all of it.
    gc.freeze()
    logging.set_verbosity_error()
    torch.set_num_threads(setting.num_threads)
    if setting.device == "cpu" and cell.mode == "train":
        keep_freed_memory()  # as ``training`` does
    else:
        give_freed_memory_back()
    try:
        with _limit_bytes(setting.device) as available:
            _measure(sender, cell, setting)
    except Exception as error:  # Whatever ends a run is the reason that its row shows.
        if _is_out_of_bytes(error):
            failure = f"it needs more than the {available / 2**30:.1f} GiB that were free"
        else:
            failure = f"{type(error).__name__}: {error}".splitlines()[0]
        sender.send({"failure": failure})


def _measure(sender: Connection, cell: Cell, setting: Setting) -> None:
    """Build, warm up, run, and read the prompt for its state."""
    spec, mode, device = cell.model, MODES[cell.mode], setting.device
    model = spec.build(max_tokens=count_positions(cell), seed=setting.seed, device=device)
    vocab_size = model.config.vocab_size
    shape = (cell.batch_size, cell.num_tokens + 1)
    ids = cut_rows(setting.text, *shape, vocab_size).to(device)
    workload = None
    if spec.compiler is None:
        few = min(_WARMUP_TOKENS, cell.num_tokens)
        rows = min(-(-_WARMUP_TOKENS // few), cell.batch_size)
        short = cut_rows(setting.text, rows, few + 1, vocab_size).to(device)
        time_once(mode.build(spec, copy.deepcopy(model), short), device)
    else:  # A graph is compiled for its sizes.
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


def count_positions(cell: Cell) -> int:
    """Return the tokens that the model of a cell has to have room for."""
    return cell.num_tokens + 1 + NEW_TOKENS


def _volunteer_for_the_killer() -> None:
    """Let Linux end this process before others if bytes run out."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


@contextlib.contextmanager
def _limit_bytes(device: str) -> Iterator[int]:
    """Refuse this process more than most of what is free on a CPU, and say how much is free."""
    available = _read_available_bytes() if device == "cpu" else 0
    if device == "cuda":
        available = torch.cuda.mem_get_info()[0]
    elif available:
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        held = _read_data_bytes()
        resource.setrlimit(resource.RLIMIT_DATA, (held + int(_BYTES_SHARE * available), hard))
    yield available


def _read_available_bytes() -> int:
    """Return the bytes that Linux has free for a process; 0 elsewhere."""
    listing = Path("/proc/meminfo")
    if listing.is_file():
        for line in listing.read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 0


def _read_data_bytes() -> int:
    """Return the bytes of this process that count towards its limit."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) * 1024
    return 0


def _is_out_of_bytes(error: BaseException) -> bool:
    """Return whether an error says that no more bytes were to be had."""
    signs = ("can't allocate memory", "not enough memory", "out of memory", "cannot allocate")
    return isinstance(error, MemoryError) or any(sign in str(error).lower() for sign in signs)
