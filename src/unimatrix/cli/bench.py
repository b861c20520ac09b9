"""``unimatrix bench``: speed and bytes of presets beside the models of other libraries."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unimatrix.cli.common import (
    DeviceOption,
    JsonOption,
    SeedOption,
    emit,
    make_log,
    parse_overrides,
    pick_device,
)
from unimatrix.errors import InputError, require_choice
from unimatrix.train.field_types import NOTHING

if TYPE_CHECKING:
    from unimatrix.bench.models import BenchModel
    from unimatrix.bench.plan import BenchPlan

_MODES = ("train", "forward", "prefill", "decode", "step", "automaton", "start")
_PRESETS = ("core", "sparsepointer", "unimatrix")
_PEERS = ("llama", "mamba2", "rwkv")
_GPU_PEERS = ("gla", "gated-deltanet")
_QUICK_MODES = ("train", "prefill", "decode")
_LENGTHS = (64, 256, 1024, 4096, 16_384, 65_536, 262_144, 1_048_576)
_QUICK_LENGTHS = (128, 1024)
_ROUNDS, _QUICK_ROUNDS = 20, 3
_BUDGET_S, _QUICK_BUDGET_S = 20.0, 2.0


ModeOption = Annotated[
    list[str] | None,
    typer.Option(
        "--mode",
        help="What to time: train (a step: forward, backward, AdamW), forward, prefill, decode "
        "(a token through generate), step (a token through forward), automaton (the suffix "
        "automaton alone, at the two greatest lengths) or start (a new process up to its first "
        "tokens). Repeatable. [default: all]",
    ),
]
LengthOption = Annotated[
    list[int] | None,
    typer.Option(
        "--length",
        help="Tokens of a sequence, or before the tokens decoded. Repeatable. "
        "[default: 64 to 1048576, each 4 times the last]",
    ),
]
BatchSizeOption = Annotated[
    int | None,
    typer.Option(
        "--batch-size",
        min=1,
        help="Sequences of a train step or forward pass. [default: as many as make 2048 "
        "tokens, on a GPU 65536, at least one]",
    ),
]
PresetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--preset", help=f"Preset to time, or none. Repeatable. [default: {', '.join(_PRESETS)}]"
    ),
]
PeerOption = Annotated[
    list[str] | None,
    typer.Option(
        "--peer",
        help=f"Model of another library to time: {', '.join(_PEERS + _GPU_PEERS)}, or none. "
        f"Repeatable. [default: {', '.join(_PEERS)}; on a GPU all]",
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="FIELD=VALUE",
        help="Change a field of every model's configuration, such as hidden_size=512; peers "
        "take the sizes. Repeatable.",
    ),
]
EqualParametersOption = Annotated[
    bool,
    typer.Option(
        "--equal-parameters",
        help="Give every peer as many parameters as the first preset, by its widths; without, "
        "all have the width and depth of a preset.",
    ),
]
PrecisionOption = Annotated[
    str,
    typer.Option(
        "--precision",
        help="Of matrix products, float32 or bfloat16 (autocast); weights and states are "
        "float32 in both.",
    ),
]
DataOption = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="CORPUS",
        help="What is read: a named corpus, file, folder or glob. [default: pystdlib]",
    ),
]
RoundsOption = Annotated[
    int | None, typer.Option("--rounds", min=1, help=f"Rounds timed. [default: {_ROUNDS}]")
]
BudgetOption = Annotated[
    float | None,
    typer.Option(
        "--budget",
        min=0.0,
        help="Seconds for a model at a length: fewer rounds where they would take longer, and "
        f"skipped where one run would. [default: {_BUDGET_S:g}]",
    ),
]
ThreadsOption = Annotated[
    int | None, typer.Option("--threads", min=1, help="CPU threads. [default: all cores]")
]
CompileOption = Annotated[
    bool,
    typer.Option(
        "--compile",
        help="Time train steps of presets and of the Llama through torch.compile too, as "
        "train.compile does: a C++ compiler, and a minute for every cell.",
    ),
]
QuickOption = Annotated[
    bool,
    typer.Option(
        "--quick", help="Three modes, two lengths, three rounds: two minutes on two cores."
    ),
]
OutOption = Annotated[
    Path | None, typer.Option("--out", help="New folder to write record.json and plots as PNG to.")
]


def run(
    mode: ModeOption = None,
    length: LengthOption = None,
    batch_size: BatchSizeOption = None,
    preset: PresetOption = None,
    peer: PeerOption = None,
    assignments: SetOption = None,
    equal_parameters: EqualParametersOption = False,
    precision: PrecisionOption = "float32",
    text: DataOption = None,
    rounds: RoundsOption = None,
    budget: BudgetOption = None,
    threads: ThreadsOption = None,
    compile_steps: CompileOption = False,
    quick: QuickOption = False,
    out: OutOption = None,
    seed: SeedOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Time presets beside a Llama, Mamba-2 and RWKV-4 of the same width and depth, interleaved.

    Dropout 0, no position table, the same text for all. Each cell first runs once in a
    process of its own, which tells its peak bytes and whether it can be timed; then all models run
    in turn, so ratios hold when the machine's speed drifts. Nothing is timed whose fast path does
    not compute what its reference does.
    """
    place = pick_device(device)
    modes = _choose("mode", mode, _MODES, _QUICK_MODES if quick else _MODES)
    peers = _choose_peers(peer, place)
    lengths = _choose_lengths(length, quick=quick)

    from unimatrix.bench.plan import ALONE, BenchPlan
    from unimatrix.bench.workloads import load_text
    from unimatrix.presets import PRESETS

    models = _make_models(
        modes,
        _choose("preset", preset, PRESETS, _PRESETS),
        peers,
        {"overrides": parse_overrides(assignments or []), "precision": precision},
        compiles=compile_steps,
        equal_parameters=equal_parameters,
    )
    load_text(1, text)  # Refuses a bad corpus before anything is timed.
    plan = BenchPlan(
        modes=[mode for mode in modes if mode not in ALONE],
        alone=[mode for mode in modes if mode in ALONE],
        lengths=lengths,
        models=models,
        batch_size=batch_size,
        num_rounds=rounds or (_QUICK_ROUNDS if quick else _ROUNDS),
        budget_s=budget if budget is not None else (_QUICK_BUDGET_S if quick else _BUDGET_S),
        seed=seed or 0,
        device=place,
        num_threads=threads,
        text=text,
    )
    emit(_run_visibly(plan, out), as_json, _render)


def _choose_lengths(wanted: list[int] | None, *, quick: bool) -> list[int]:
    """Return the lengths in rising order."""
    lengths = sorted(wanted or (_QUICK_LENGTHS if quick else _LENGTHS))
    if lengths[0] < 2:
        raise InputError(f"--length {lengths[0]} is too short; time sequences of at least 2 tokens")
    _require_once("length", lengths)
    return lengths


def _choose(
    option: str, wanted: list[str] | None, known: Iterable[str], default: Iterable[str]
) -> list[str]:
    """Return the names that were wanted, or else the default; ``none`` stands for no name."""
    names, known = list(wanted or default), list(known)
    if names and all(name in NOTHING for name in names):
        return []
    for name in names:
        require_choice(f"unknown {option}", name, known)
    _require_once(option, names)
    return names


def _choose_peers(wanted: list[str] | None, device: str) -> list[str]:
    """Return the peers to time; the default has those that need a GPU on a GPU only."""
    known = (*_PEERS, *_GPU_PEERS)
    return _choose("peer", wanted, known, known if device == "cuda" else _PEERS)


def _require_once(option: str, values: list[Any]) -> None:
    if len(set(values)) < len(values):
        text = ", ".join(map(str, values))
        raise InputError(f"--{option} {text} names one twice; name each once")


def _make_models(
    modes: list[str],
    presets: list[str],
    peers: list[str],
    settings: dict[str, Any],
    *,
    compiles: bool,
    equal_parameters: bool,
) -> "list[BenchModel]":
    """Return the models to time; each configuration is made once, to refuse a bad one."""
    from unimatrix.bench.models import COMPILER, DTYPES, BenchModel, match_parameters
    from unimatrix.bench.peers import LLAMA

    needs_model = any(mode != "automaton" for mode in modes)
    if not modes or (needs_model and not (presets or peers)):
        raise InputError("nothing is left to time; name a --mode, and a --preset or a --peer")
    require_choice("unknown precision", settings["precision"], DTYPES)
    models = [BenchModel(name=name, **settings) for name in (*presets, *peers)]
    if compiles:
        if not presets or "train" not in modes:
            raise InputError(
                "--compile is for train steps of presets; name --mode train and a --preset"
            )
        eager = [model for model in models if model.name == LLAMA or not model.is_peer]
        models += [replace(model, compiler=COMPILER) for model in eager]
    for model in models:
        model.make_config()
    if equal_parameters:
        if not (presets and peers):
            raise InputError(
                "--equal-parameters is for peers beside a preset; name a --preset and a --peer"
            )
        models = match_parameters(models)
    return models


def _run_visibly(plan: "BenchPlan", out: Path | None) -> dict[str, Any]:
    """Run the plan with a progress bar; write record and plots if there is a folder."""
    from unimatrix.reports.bench_plots import write_bench_plots
    from unimatrix.train.run_folder import create_folder, describe_run, write_record

    if out is None:
        return _measure_visibly(plan)
    with create_folder(out):
        start = describe_run(plan.device)
        result = _measure_visibly(plan)
        write_record(out, {**start, "seed": plan.seed, "results": result})
        if result["rows"]:
            write_bench_plots(result["rows"], out)
    return result


def _measure_visibly(plan: "BenchPlan") -> dict[str, Any]:
    """Run the plan with a progress bar."""
    from rich.markup import escape
    from rich.progress import Progress

    from unimatrix.bench.equivalence import EquivalenceError
    from unimatrix.bench.run import run_bench
    from unimatrix.bench.starts import StartError
    from unimatrix.hub.load import hide_progress

    log = make_log()
    total = sum(len(plan.list_cells(mode)) for mode in plan.modes)
    with hide_progress(), Progress(console=log, transient=True) as progress:
        bar = progress.add_task("checking", total=total)

        def show(text: str, done: int) -> None:
            progress.update(bar, description=text, completed=done)

        try:
            return run_bench(plan, show)
        except (EquivalenceError, StartError) as error:
            progress.stop()
            log.print(f"[bold red]error:[/] {escape(str(error))}")
            raise typer.Exit(1) from None


def _render(result: dict[str, Any]) -> str:
    """Return a table a mode, between the conditions and what was skipped."""
    from unimatrix.bench.workloads import MODES
    from unimatrix.cli.terminal import to_text
    from unimatrix.reports.bench_tables import (
        SHORT_HEADER,
        describe_automaton,
        describe_rows,
        describe_starts,
        drop_empty_columns,
    )

    parts: list[Any] = [_describe_conditions(result)]
    for mode in dict.fromkeys(row["mode"] for row in result["rows"]):
        rows = describe_rows([row for row in result["rows"] if row["mode"] == mode])
        parts += _make_table(MODES[mode].title, *drop_empty_columns(SHORT_HEADER, rows))
    if "automaton" in result:
        title = "suffix automaton, one thread"
        parts += _make_table(title, *describe_automaton(result["automaton"]))
    if "start" in result:
        title = "new process, seconds beyond importing torch and transformers"
        parts += _make_table(title, *describe_starts(result["start"]))
    if result["rows"]:
        parts += ["", *_explain_columns(result)]
    parts += [
        f"skipped: {row['mode']}, {row['model']} at {row['num_tokens']:,}: {row['skipped']}"
        for row in result["rows"]
        if row["skipped"]
    ]
    parts += [
        f"skipped: start, {row['model']}: {row['skipped']}"
        for row in result.get("start", [])
        if row["skipped"]
    ]
    return to_text(*parts)


def _describe_conditions(result: dict[str, Any]) -> str:
    """Return precision, threads, ceilings of the machine and the checks, on one line."""
    parts = [f"{result['dtype']}, dropout 0, {result['threads']} threads"]
    if result["matmul_peak_flops_per_s"] is not None:
        parts.append(f"matmul peak {result['matmul_peak_flops_per_s'] / 1e9:,.0f} GFLOP/s")
    if result["copy_peak_bytes_per_s"] is not None:
        parts.append(f"copy peak {result['copy_peak_bytes_per_s'] / 1e9:,.0f} GB/s")
    for precision in dict.fromkeys(check["precision"] for check in result["checks"]):
        errors = [c["error"] for c in result["checks"] if c["precision"] == precision]
        where = "" if precision == "float32" else f" in {precision}"
        parts.append(f"{len(errors)} fast paths within {max(errors):.0e} of theirs{where}")
    return "; ".join(parts)


def _make_table(title: str, header: Sequence[str], lines: Sequence[Sequence[str]]) -> list[Any]:
    """Return a table below an empty line and its title."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for index, column in enumerate(header):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    for cells in lines:
        table.add_row(*cells)
    return ["", f"[bold]{title}[/]", table]


def _explain_columns(result: dict[str, Any]) -> list[str]:
    """Return the legend of the tables, and the parameters of each model."""
    legend = (
        "ms: median of n interleaved rounds; /Llama, /first: median over rounds of the ratio "
        "to the Llama and to the shortest length; floor: ms of the arithmetic at the matmul "
        "peak; peak: bytes of a process, net; state: bytes carried on by one sequence"
    )
    if result["copy_peak_bytes_per_s"] is not None:
        legend += "; of copy: share of the time that writing and reading the peak bytes takes"
    sizes = {
        row["model"].partition(",")[0]: row["parameters"]
        for row in result["rows"]
        if not row["skipped"]
    }
    counts = ", ".join(f"{name} {number:,}" for name, number in sizes.items())
    return [legend, f"parameters: {counts}"]
