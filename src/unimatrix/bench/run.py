"""One run of the benchmark: checks, then every cell probed alone and timed beside the others."""

import contextlib
import functools
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch.nn import Module
from transformers.utils import logging

from unimatrix.bench.arithmetic import FLOPS_PER_MULTIPLY_ADD, count_model
from unimatrix.bench.automaton import time_automaton
from unimatrix.bench.ceilings import Ceilings
from unimatrix.bench.clock import (
    Spread,
    Workload,
    choose_rounds,
    compare_rounds,
    summarize,
    time_interleaved,
)
from unimatrix.bench.equivalence import check_compiled, check_model
from unimatrix.bench.models import BenchModel
from unimatrix.bench.peers import LLAMA
from unimatrix.bench.probe import Cell, Probe, Setting, count_positions, probe
from unimatrix.bench.starts import time_starts
from unimatrix.bench.workloads import MODES, NEW_TOKENS, choose_batch_size, cut_rows, load_text
from unimatrix.ops.numba.torch_threads import flush_denormals
from unimatrix.train.allocator import keep_freed_memory

Row = dict[str, Any]

ALONE = ("automaton", "start")
"""What is timed without cells: the suffix automaton at the two greatest lengths, and new processes
up to the first tokens of a checkpoint."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchPlan:
    """What is to be timed.

    Attributes:
        modes: keys of ``MODES``.
        alone: what is timed without cells, of ``ALONE``.
        lengths: T, in rising order.
        models: presets and peers.
        batch_size: B of train steps and forward passes; ``None`` fills ``TOKENS_PER_BATCH``.
        num_rounds: rounds of a cell, if they fit the budget.
        budget_s: seconds that one run may take, and that all rounds of a cell may.
        seed: of the weights.
        device: cpu, cuda or mps.
        num_threads: CPU threads; ``None`` is what torch has.
        text: a corpus that is read; ``None`` is the standard library's sources.
    """

    modes: Sequence[str]
    alone: Sequence[str] = ()
    lengths: Sequence[int]
    models: Sequence[BenchModel]
    batch_size: int | None
    num_rounds: int
    budget_s: float
    seed: int
    device: str
    num_threads: int | None = None
    text: str | None = None

    @property
    def precision(self) -> str:
        """Of the products of all models."""
        return self.models[0].precision if self.models else "float32"

    def list_cells(self, mode: str) -> list[Cell]:
        """Return the cells of a mode, lengths rising; train steps alone are compiled."""
        models = [model for model in self.models if mode == "train" or model.compiler is None]
        return [
            Cell(
                mode=mode,
                model=model,
                num_tokens=num_tokens,
                batch_size=choose_batch_size(mode, num_tokens, self.batch_size, self.device),
            )
            for num_tokens in self.lengths
            for model in models
        ]

    def count_text_bytes(self) -> int:
        """Return the bytes of text that the largest cell reads, or the automaton."""
        cells = [cell for mode in self.modes for cell in self.list_cells(mode)]
        read = [cell.batch_size * (cell.num_tokens + 1) for cell in cells]
        return max([*read, *self.lengths])


class _Ready(NamedTuple):
    """A cell that is about to be timed, or was.

    Attributes:
        probe: what its run in a process of its own showed.
        model: the model here.
        workload: what is timed.
    """

    probe: Probe
    model: Module
    workload: Workload


def run_bench(
    plan: BenchPlan, on_progress: Callable[[str, int], None] = lambda _text, _done: None
) -> dict[str, Any]:
    """Check, probe and time everything that is planned.

    Args:
        plan: what to time.
        on_progress: called with what happens now and the number of cells finished.

    Returns:
        threads, ceilings (``None`` without cells), models, checks, rows, and the rows of what is
        timed alone, as JSON types.

    Raises:
        EquivalenceError: if a fast path of a preset does not compute what its reference does.
        InputError: for a model that no configuration describes, or a text that is not there.
    """
    if plan.num_threads is not None:
        torch.set_num_threads(plan.num_threads)
    if plan.device == "cpu":
        keep_freed_memory()
    with _silence_transformers():
        return _run_plan(plan, on_progress)


@contextlib.contextmanager
def _silence_transformers() -> Iterator[None]:
    """Keep off the terminal what transformers has to say about every model that is built."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _run_plan(plan: BenchPlan, on_progress: Callable[[str, int], None]) -> dict[str, Any]:
    """Do what ``run_bench`` says."""
    text = load_text(plan.count_text_bytes(), plan.text)
    result: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "dtype": plan.precision,
        "rounds": plan.num_rounds,
        "budget_s": plan.budget_s,
        "text": plan.text or "pystdlib",
        "matmul_peak_flops_per_s": None,
        "copy_peak_bytes_per_s": None,
        "models": [_describe(spec) for spec in plan.models],
        "checks": [],
        "rows": [],
    }
    if plan.modes:
        result |= _run_cells(plan, text, on_progress)
    num_cells = len(result["rows"])
    if "automaton" in plan.alone:
        on_progress("timing the suffix automaton", num_cells)
        result["automaton"] = time_automaton(
            text, list(plan.lengths)[-2:], num_rounds=plan.num_rounds, budget_s=plan.budget_s
        )
    if "start" in plan.alone:
        on_progress("timing new processes", num_cells)
        result["start"] = time_starts(
            plan.models,
            num_rounds=plan.num_rounds,
            budget_s=plan.budget_s,
            seed=plan.seed,
            device=plan.device,
            precision=plan.precision,
            num_threads=torch.get_num_threads(),
        )
    return result


def _run_cells(
    plan: BenchPlan, text: bytes, on_progress: Callable[[str, int], None]
) -> dict[str, Any]:
    """Return ceilings, checks and rows of all modes."""
    checks = []
    for spec in plan.models:
        if not spec.is_peer:
            on_progress(f"checking {spec.label}", 0)
            check = check_model if spec.compiler is None else check_compiled
            checks += check(spec, seed=plan.seed, device=plan.device)
    setting = Setting(
        text=text,
        seed=plan.seed,
        device=plan.device,
        num_threads=torch.get_num_threads(),
        budget_s=plan.budget_s,
    )
    ceilings = Ceilings(plan.device, plan.precision, copies=plan.device == "cuda")
    rows: list[Row] = []
    for mode in plan.modes:
        show = functools.partial(_show_from, len(rows), on_progress)
        rows += _run_mode(plan, mode, setting, ceilings, show)
    for row in rows:
        if row["skipped"] is None:
            _add_floors(row, ceilings)
    return {
        "matmul_peak_flops_per_s": ceilings.flops_per_s,
        "copy_peak_bytes_per_s": ceilings.bytes_per_s,
        "checks": [asdict(check) for check in checks],
        "rows": rows,
    }


def _show_from(num_before: int, show: Callable[[str, int], None], text: str, done: int) -> None:
    """Add the cells of the modes before to those finished in this one."""
    show(text, num_before + done)


def _describe(spec: BenchModel) -> dict[str, Any]:
    """Return a model's fields and what its train step optimizes."""
    return {
        "name": spec.label,
        "overrides": dict(spec.overrides),
        "training": spec.describe_training(),
    }


def _run_mode(
    plan: BenchPlan,
    mode: str,
    setting: Setting,
    ceilings: Ceilings,
    on_progress: Callable[[str, int], None],
) -> list[Row]:
    """Return a row a cell, lengths rising."""
    cells = plan.list_cells(mode)
    probes = _probe_cells(cells, setting, on_progress)
    # Tokens at different positions are compared with each other, so they are timed together.
    groups = [cells]
    if not MODES[mode].per_token:
        groups = [[c for c in cells if c.num_tokens == length] for length in plan.lengths]
    rows: list[Row] = []
    for group in groups:
        on_progress(f"timing {mode}, {group[0].num_tokens:,} tokens", len(cells))
        rows += _time_group(plan, group, probes, setting, ceilings)
    return rows


def _probe_cells(
    cells: Sequence[Cell], setting: Setting, on_progress: Callable[[str, int], None]
) -> list[tuple[Cell, Probe]]:
    """Return what a run of each cell alone showed; a model that failed is not tried at more."""
    failed: dict[str, Cell] = {}
    probes = []
    for index, cell in enumerate(cells):
        name = cell.model.label
        on_progress(f"{cell.mode}, {cell.num_tokens:,} tokens: {name}", index)
        absence = cell.model.explain_absence(cell.num_tokens, setting.device)
        if absence is not None:
            found = Probe(failure=absence)
        elif name in failed:
            found = Probe(failure=f"not tried: it failed at {failed[name].num_tokens:,} tokens")
        else:
            found = probe(cell, setting)
            if found.failure is not None:
                failed[name] = cell
        probes.append((cell, found))
    return probes


def _time_group(
    plan: BenchPlan,
    group: Sequence[Cell],
    probes: Sequence[tuple[Cell, Probe]],
    setting: Setting,
    ceilings: Ceilings,
) -> list[Row]:
    """Time the cells of a group in turn and return a row for each, timed or not."""
    # What was compiled for other sizes counts against the limit of graphs of a function.
    torch.compiler.reset()
    found = {_name(cell): result for cell, result in probes}
    ready = {
        _name(cell): _prepare(cell, found[_name(cell)], setting)
        for cell in group
        if found[_name(cell)].failure is None
    }
    num_rounds = {
        key: choose_rounds(plan.num_rounds, plan.budget_s, one.probe.run_s)
        for key, one in ready.items()
    }
    flushing = flush_denormals() if group[0].mode == "train" else contextlib.nullcontext()
    with flushing:
        seconds = time_interleaved(
            {key: one.workload for key, one in ready.items()},
            num_rounds,
            device=plan.device,
            on_round=ceilings.sample,
        )
    rows = [_make_row(cell, found[_name(cell)], ready.get(_name(cell)), seconds) for cell in group]
    if plan.device == "cuda":
        # The next probes are other processes on the same device.
        del ready
        gc.collect()
        torch.cuda.empty_cache()
    return rows


def _name(cell: Cell) -> tuple[str, int]:
    return cell.model.label, cell.num_tokens


def _prepare(cell: Cell, found: Probe, setting: Setting) -> _Ready:
    """Build a cell in this process."""
    model = cell.model.build(
        max_tokens=count_positions(cell), seed=setting.seed, device=setting.device
    )
    ids = cut_rows(setting.text, cell.batch_size, cell.num_tokens + 1, model.config.vocab_size)
    workload = MODES[cell.mode].build(cell.model, model, ids.to(setting.device))
    return _Ready(found, model, workload)


def _make_row(
    cell: Cell,
    found: Probe,
    ready: _Ready | None,
    seconds: Mapping[tuple[str, int], list[float]],
) -> Row:
    """Return a cell as JSON types."""
    row: Row = {
        "mode": cell.mode,
        "model": cell.model.label,
        "num_tokens": cell.num_tokens,
        "batch_size": cell.batch_size,
        "skipped": found.failure,
    }
    if ready is None:
        return row
    mode, mine = MODES[cell.mode], seconds[_name(cell)]
    if not mine:
        return row | {"skipped": "the device has no room for it beside the others"}
    spread = summarize(mine)
    per_run = NEW_TOKENS if mode.per_token else 1
    num_tokens = NEW_TOKENS if mode.per_token else cell.batch_size * cell.num_tokens
    cost = count_model(cell.model.name, ready.model)
    baseline = seconds.get((LLAMA, cell.num_tokens))
    shortest = seconds.get((cell.model.label, min(length for _, length in seconds)))
    return row | {
        "parameters": sum(parameter.numel() for parameter in ready.model.parameters()),
        **_to_milliseconds(spread, per_run),
        "tokens_per_s": num_tokens / spread.median,
        "ratio_to_llama": compare_rounds(mine, baseline) if baseline else None,
        "ratio_to_shortest": compare_rounds(mine, shortest)
        if mode.per_token and shortest
        else None,
        "multiply_adds": cell.batch_size * mode.cost_of(cost, cell.num_tokens),
        "peak_bytes": found.peak_bytes,
        "state_bytes": found.state_bytes,
    }


def _to_milliseconds(spread: Spread, per_run: int) -> Row:
    """Return the spread of one run, or of one token of several, in milliseconds."""
    return {
        "rounds": spread.rounds,
        "median_ms": 1e3 * spread.median / per_run,
        "fastest_ms": 1e3 * spread.fastest / per_run,
        "slowest_ms": 1e3 * spread.slowest / per_run,
    }


def _add_floors(row: Row, ceilings: Ceilings) -> None:
    """Add what the row's arithmetic takes at the machine's peak, and its bytes, now both are known.

    What a train step holds at its peak was written once and is read once: no fewer bytes move.
    """
    floor_s = FLOPS_PER_MULTIPLY_ADD * row["multiply_adds"] / ceilings.flops_per_s
    row["floor_ms"] = 1e3 * floor_s
    row["peak_share"] = row["floor_ms"] / row["median_ms"]
    if ceilings.bytes_per_s is None or row["peak_bytes"] is None or row["mode"] != "train":
        return
    row["bytes_floor_ms"] = 1e3 * 2 * row["peak_bytes"] / ceilings.bytes_per_s
    row["bandwidth_share"] = row["bytes_floor_ms"] / row["median_ms"]
