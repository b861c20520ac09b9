"""One run of the benchmark: checks, then every cell probed alone and timed beside the others."""

import contextlib
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from unimatrix.bench.arithmetic import FLOPS_PER_MULTIPLY_ADD, count_model
from unimatrix.bench.automaton import time_automaton
from unimatrix.bench.ceilings import Ceilings
from unimatrix.bench.clock import choose_rounds, compare_rounds, summarize, time_interleaved
from unimatrix.bench.equivalence import check_compiled, check_model
from unimatrix.bench.peers import LLAMA
from unimatrix.bench.plan import BenchPlan
from unimatrix.bench.probe import BenchCell, Probe, Setting, probe
from unimatrix.bench.starts import time_starts
from unimatrix.bench.workloads import MODES, NEW_TOKENS, load_text
from unimatrix.ops.numba.torch_threads import flush_denormals
from unimatrix.train.allocator import keep_freed_memory

Row = dict[str, Any]

Progress = Callable[[str, int], None]
_Key = tuple[str, int]  # what tells the cells of a mode apart: model and length


def run_bench(plan: BenchPlan, on_progress: Progress = lambda _text, _done: None) -> dict[str, Any]:
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


def _run_plan(plan: BenchPlan, on_progress: Progress) -> dict[str, Any]:
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
        "models": [spec.describe() for spec in plan.models],
        "checks": [],
        "rows": [],
    }
    if plan.modes:
        result["checks"] = _check_models(plan, on_progress)
        timer = _CellTimer(plan, text, on_progress)
        rows = [row for mode in plan.modes for row in timer.run_mode(mode)]
        result["matmul_peak_flops_per_s"] = timer.ceilings.flops_per_s
        result["copy_peak_bytes_per_s"] = timer.ceilings.bytes_per_s
        result["rows"] = [_add_floors(row, timer.ceilings) for row in rows]
    num_cells = len(result["rows"])
    if "automaton" in plan.alone:
        on_progress("timing the suffix automaton", num_cells)
        result["automaton"] = time_automaton(
            text, list(plan.lengths)[-2:], num_rounds=plan.num_rounds, budget_s=plan.budget_s
        )
    if "start" in plan.alone:
        on_progress("timing new processes", num_cells)
        result["start"] = time_starts(plan)
    return result


def _check_models(plan: BenchPlan, on_progress: Progress) -> list[dict[str, Any]]:
    """Return the checks of all presets, as JSON types."""
    checks = []
    for spec in plan.models:
        if not spec.is_peer:
            on_progress(f"checking {spec.label}", 0)
            check = check_model if spec.compiler is None else check_compiled
            checks += check(spec, seed=plan.seed, device=plan.device)
    return [asdict(check) for check in checks]


class _CellTimer:
    """Probes and times the cells of a plan, and shows how many are finished.

    Args:
        plan: which cells.
        text: what they read.
        on_progress: as in ``run_bench``.

    Attributes:
        ceilings: sampled in every round.
    """

    def __init__(self, plan: BenchPlan, text: bytes, on_progress: Progress) -> None:
        self._plan, self._on_progress, self._num_finished = plan, on_progress, 0
        self._setting = Setting(
            text=text,
            seed=plan.seed,
            device=plan.device,
            num_threads=torch.get_num_threads(),
            budget_s=plan.budget_s,
        )
        copies = plan.device == "cuda"
        self.ceilings = Ceilings(plan.device, plan.precision, copies=copies)

    def run_mode(self, mode: str) -> list[Row]:
        """Return a row a cell, lengths rising."""
        cells = self._plan.list_cells(mode)
        probes = self._probe(cells)
        # Tokens at different positions are compared with each other, so they are timed together.
        groups = [cells]
        if not MODES[mode].per_token:
            lengths = self._plan.lengths
            groups = [[c for c in cells if c.num_tokens == length] for length in lengths]
        rows: list[Row] = []
        for group in groups:
            first_length = f"{group[0].num_tokens:,} tokens"
            self._on_progress(f"timing {mode}, {first_length}", self._num_finished)
            rows += self._time_group(group, probes)
        return rows

    def _probe(self, cells: Sequence[BenchCell]) -> dict[_Key, Probe]:
        """Return what a run of each cell alone showed; a model that failed is not tried at more."""
        failed: dict[str, BenchCell] = {}
        probes = {}
        for cell in cells:
            name = cell.model.label
            text = f"{cell.mode}, {cell.num_tokens:,} tokens: {name}"
            self._on_progress(text, self._num_finished)
            absence = cell.model.explain_absence(cell.num_tokens, self._setting.device)
            if absence is None and name in failed:
                absence = f"not tried: it failed at {failed[name].num_tokens:,} tokens"
            found = probe(cell, self._setting) if absence is None else Probe(failure=absence)
            if absence is None and found.failure is not None:
                failed[name] = cell
            probes[_key(cell)] = found
            self._num_finished += 1
        return probes

    def _time_group(self, group: Sequence[BenchCell], probes: Mapping[_Key, Probe]) -> list[Row]:
        """Time the cells of a group in turn and return a row for each, timed or not."""
        # What was compiled for other sizes counts against the limit of graphs of a function.
        torch.compiler.reset()
        models: dict[_Key, PreTrainedModel] = {}
        workloads, num_rounds = {}, {}
        for cell in group:
            key, found = _key(cell), probes[_key(cell)]
            if found.failure is None:
                models[key] = cell.build(self._setting)
                ids = cell.cut_text(self._setting, models[key].config.vocab_size)
                workloads[key] = MODES[cell.mode].build(cell.model, models[key], ids)
                rounds = choose_rounds(self._plan.num_rounds, self._plan.budget_s, found.run_s)
                num_rounds[key] = rounds
        is_training = group[0].mode == "train"
        with flush_denormals() if is_training else contextlib.nullcontext():
            seconds = time_interleaved(
                workloads, num_rounds, device=self._plan.device, on_round=self.ceilings.sample
            )
        rows = [_make_row(cell, probes[_key(cell)], models, seconds) for cell in group]
        if self._plan.device == "cuda":
            # The next probes are other processes on the same device.
            del models, workloads
            gc.collect()
            torch.cuda.empty_cache()
        return rows


def _key(cell: BenchCell) -> _Key:
    return cell.model.label, cell.num_tokens


def _make_row(
    cell: BenchCell,
    found: Probe,
    models: Mapping[_Key, PreTrainedModel],
    seconds: Mapping[_Key, list[float]],
) -> Row:
    """Return a cell as JSON types."""
    row: Row = {
        "mode": cell.mode,
        "model": cell.model.label,
        "num_tokens": cell.num_tokens,
        "batch_size": cell.batch_size,
        "skipped": found.failure,
    }
    if found.failure is not None:
        return row
    mode, model, ours = MODES[cell.mode], models[_key(cell)], seconds[_key(cell)]
    if not ours:
        return row | {"skipped": "the device has no room for it beside the others"}
    spread = summarize(ours)
    num_tokens = NEW_TOKENS if mode.per_token else cell.batch_size * cell.num_tokens
    llama = seconds.get((LLAMA, cell.num_tokens))
    shortest = seconds.get((cell.model.label, min(length for _, length in seconds)))
    if not mode.per_token:
        shortest = None
    cost = count_model(cell.model.name, model)
    return row | {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        **spread.to_milliseconds(NEW_TOKENS if mode.per_token else 1),
        "tokens_per_s": num_tokens / spread.median,
        "ratio_to_llama": compare_rounds(ours, llama) if llama else None,
        "ratio_to_shortest": compare_rounds(ours, shortest) if shortest else None,
        "multiply_adds": cell.batch_size * mode.cost_of(cost, cell.num_tokens),
        "peak_bytes": found.peak_bytes,
        "state_bytes": found.state_bytes,
    }


def _add_floors(row: Row, ceilings: Ceilings) -> Row:
    """Return the row with what its arithmetic and its bytes take at the machine's final peaks.

    What a train step holds at its peak was written once and is read once: no fewer bytes move.
    """
    if row["skipped"] is not None:
        return row
    floor_ms = 1e3 * FLOPS_PER_MULTIPLY_ADD * row["multiply_adds"] / ceilings.flops_per_s
    row = row | {"floor_ms": floor_ms, "peak_share": floor_ms / row["median_ms"]}
    if ceilings.bytes_per_s is None or row["peak_bytes"] is None or row["mode"] != "train":
        return row
    bytes_ms = 1e3 * 2 * row["peak_bytes"] / ceilings.bytes_per_s
    return row | {"bytes_floor_ms": bytes_ms, "bandwidth_share": bytes_ms / row["median_ms"]}
