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
from unimatrix.errors import InputError, suggest
from unimatrix.train.field_types import NOTHING

if TYPE_CHECKING:
    from unimatrix.bench.run import BenchPlan

_MODES = ("train", "forward", "prefill", "decode", "step", "automaton", "start")
_PRESETS = ("core", "sparsepointer", "unimatrix")
_PEERS = ("llama", "mamba2", "rwkv")
_GPU_PEERS = ("gla", "gated-deltanet")
_QUICK_MODES = ("train", "prefill", "decode")
_LENGTHS = (64, 256, 1024, 4096, 16_384, 65_536, 262_144, 1_048_576)
_QUICK_LENGTHS = (128, 1024)
_ROUNDS, _QUICK_ROUNDS = 20, 3
_BUDGET_S, _QUICK_BUDGET_S = 20.0, 2.0


def run(
    mode: Annotated[
        list[str] | None,
        typer.Option(
            "--mode",
            help="What to time: train (a step: forward, backward, AdamW), forward, prefill, decode "
            "(a token through generate), step (a token through forward), automaton (the suffix "
            "automaton alone, at the two greatest lengths) or start (a new process up to its first "
            "tokens). Repeatable. [default: all]",
        ),
    ] = None,
    length: Annotated[
        list[int] | None,
        typer.Option(
            "--length",
            help="Tokens of a sequence, or before the tokens decoded. Repeatable. "
            "[default: 64 to 1048576, each 4 times the last]",
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size",
            min=1,
            help="Sequences of a train step or forward pass. [default: as many as make 2048 "
            "tokens, on a GPU 65536, at least one]",
        ),
    ] = None,
    preset: Annotated[
        list[str] | None,
        typer.Option(
            "--preset",
            help=f"Preset to time, or none. Repeatable. [default: {', '.join(_PRESETS)}]",
        ),
    ] = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(
            "--peer",
            help=f"Model of another library to time: {', '.join(_PEERS + _GPU_PEERS)}, or none. "
            f"Repeatable. [default: {', '.join(_PEERS)}; on a GPU all]",
        ),
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="FIELD=VALUE",
            help="Change a field of every model's configuration, such as hidden_size=512; peers "
            "take the sizes. Repeatable.",
        ),
    ] = None,
    equal_parameters: Annotated[
        bool,
        typer.Option(
            "--equal-parameters",
            help="Give every peer as many parameters as the first preset, by its widths; without, "
            "all have the width and depth of a preset.",
        ),
    ] = False,
    precision: Annotated[
        str,
        typer.Option(
            "--precision",
            help="Of matrix products, float32 or bfloat16 (autocast); weights and states are "
            "float32 in both.",
        ),
    ] = "float32",
    text: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="CORPUS",
            help="What is read: a named corpus, file, folder or glob. [default: pystdlib]",
        ),
    ] = None,
    rounds: Annotated[
        int | None, typer.Option("--rounds", min=1, help=f"Rounds timed. [default: {_ROUNDS}]")
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            "--budget",
            min=0.0,
            help="Seconds for a model at a length: fewer rounds where they would take longer, and "
            f"skipped where one run would. [default: {_BUDGET_S:g}]",
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="CPU threads. [default: all cores]")
    ] = None,
    compile_steps: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="Time train steps of presets and of the Llama through torch.compile too, as "
            "train.compile does: a C++ compiler, and a minute for every cell.",
        ),
    ] = False,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="Three modes, two lengths, three rounds: two minutes on two cores."
        ),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="New folder to write record.json and plots as PNG to."),
    ] = None,
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
    names = {
        "modes": _choose("mode", mode, _MODES, _QUICK_MODES if quick else _MODES),
        "peers": _choose_peers(peer, place),
    }
    settings = {
        "lengths": _choose_lengths(length, quick=quick),
        "batch_size": batch_size,
        "num_rounds": rounds or (_QUICK_ROUNDS if quick else _ROUNDS),
        "budget_s": budget if budget is not None else (_QUICK_BUDGET_S if quick else _BUDGET_S),
        "seed": seed or 0,
        "device": place,
        "num_threads": threads,
        "text": text,
    }
    plan = _make_plan(
        names,
        _choose_presets(preset),
        assignments or [],
        settings,
        precision=precision,
        compiles=compile_steps,
        equal_parameters=equal_parameters,
    )
    result = _run_visibly(plan, out)
    emit(result, as_json, _render)


def _choose_lengths(given: list[int] | None, *, quick: bool) -> list[int]:
    """Return the lengths in rising order."""
    lengths = sorted(given or (_QUICK_LENGTHS if quick else _LENGTHS))
    if lengths[0] < 2:
        raise InputError(f"--length {lengths[0]} is too short; time sequences of at least 2 tokens")
    _require_once("length", lengths)
    return lengths


def _choose(
    option: str, given: list[str] | None, known: Iterable[str], default: Iterable[str]
) -> list[str]:
    """Return the names given, or the default; ``none`` is no name."""
    names, known = list(given or default), list(known)
    if names and all(name in NOTHING for name in names):
        return []
    for name in names:
        if name not in known:
            raise InputError(
                f"unknown {option} {name!r}; choose from {', '.join(known)}.{suggest(name, known)}"
            )
    _require_once(option, names)
    return names


def _choose_presets(given: list[str] | None) -> list[str]:
    """Return the presets to time."""
    from unimatrix.presets import PRESETS

    return _choose("preset", given, PRESETS, _PRESETS)


def _choose_peers(given: list[str] | None, device: str) -> list[str]:
    """Return the peers to time; those that need a GPU come by themselves only where one is."""
    known = (*_PEERS, *_GPU_PEERS)
    return _choose("peer", given, known, known if device == "cuda" else _PEERS)


def _require_once(option: str, values: list[Any]) -> None:
    if len(set(values)) < len(values):
        text = ", ".join(map(str, values))
        raise InputError(f"--{option} {text} names one twice; name each once")


def _make_plan(
    names: dict[str, list[str]],
    presets: list[str],
    assignments: list[str],
    settings: dict[str, Any],
    *,
    precision: str,
    compiles: bool,
    equal_parameters: bool,
) -> "BenchPlan":
    """Return what to time; configurations are made and the text is opened, to refuse bad ones."""
    from unimatrix.bench.models import COMPILER, DTYPES, BenchModel, match_parameters
    from unimatrix.bench.peers import LLAMA
    from unimatrix.bench.run import ALONE, BenchPlan
    from unimatrix.bench.workloads import load_text

    overrides = parse_overrides(assignments)
    chosen = [*presets, *names["peers"]]
    needs_model = any(mode != "automaton" for mode in names["modes"])
    if not names["modes"] or (needs_model and not chosen):
        raise InputError("nothing is left to time; name a --mode, and a --preset or a --peer")
    if precision not in DTYPES:
        raise InputError(
            f"unknown precision {precision!r}; choose from {', '.join(DTYPES)}."
            f"{suggest(precision, DTYPES)}"
        )
    models = [BenchModel(name=name, overrides=overrides, precision=precision) for name in chosen]
    if compiles:
        if not presets or "train" not in names["modes"]:
            raise InputError(
                "--compile is for train steps of presets; name --mode train and a --preset"
            )
        models += [
            replace(model, compiler=COMPILER)
            for model in models
            if model.name == LLAMA or not model.is_peer
        ]
    for model in models:
        model.make_config()
    if equal_parameters:
        if not (presets and names["peers"]):
            raise InputError(
                "--equal-parameters is for peers beside a preset; name a --preset and a --peer"
            )
        models = match_parameters(models)
    load_text(1, settings["text"])
    modes = [mode for mode in names["modes"] if mode not in ALONE]
    alone = [mode for mode in names["modes"] if mode in ALONE]
    return BenchPlan(modes=modes, alone=alone, models=models, **settings)


def _run_visibly(plan: "BenchPlan", out: Path | None) -> dict[str, Any]:
    """Run the plan with a progress bar; keep record and plots if wanted."""
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
    """Return a table a mode."""
    from rich.table import Table

    from unimatrix.bench.workloads import MODES
    from unimatrix.cli.terminal import to_text
    from unimatrix.reports.bench_tables import (
        SHORT_HEADER,
        describe_automaton,
        describe_rows,
        describe_starts,
        drop_empty_columns,
    )

    head = f"{result['dtype']}, dropout 0, {result['threads']} threads"
    if result["matmul_peak_flops_per_s"] is not None:
        head += f"; matmul peak {result['matmul_peak_flops_per_s'] / 1e9:,.0f} GFLOP/s"
    if result["copy_peak_bytes_per_s"] is not None:
        head += f"; copy peak {result['copy_peak_bytes_per_s'] / 1e9:,.0f} GB/s"
    for precision in dict.fromkeys(check["precision"] for check in result["checks"]):
        errors = [c["error"] for c in result["checks"] if c["precision"] == precision]
        head += f"; {len(errors)} fast paths within {max(errors):.0e} of theirs"
        head += "" if precision == "float32" else f" in {precision}"
    parts: list[Any] = [head]

    def add_table(title: str, header: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
        table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
        for index, column in enumerate(header):
            table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
        for cells in lines:
            table.add_row(*cells)
        parts.extend(["", f"[bold]{title}[/]", table])

    for mode in dict.fromkeys(row["mode"] for row in result["rows"]):
        chosen = [row for row in result["rows"] if row["mode"] == mode]
        add_table(MODES[mode].title, *drop_empty_columns(SHORT_HEADER, describe_rows(chosen)))
    if "automaton" in result:
        add_table("suffix automaton, one thread", *describe_automaton(result["automaton"]))
    if "start" in result:
        title = "new process, seconds beyond importing torch and transformers"
        add_table(title, *describe_starts(result["start"]))
    reasons = [
        f"skipped: {row['mode']}, {row['model']} at {row['num_tokens']:,}: {row['skipped']}"
        for row in result["rows"]
        if row["skipped"]
    ]
    reasons += [
        f"skipped: start, {row['model']}: {row['skipped']}"
        for row in result.get("start", [])
        if row["skipped"]
    ]
    if result["rows"]:
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
        told = ", ".join(f"{name} {number:,}" for name, number in sizes.items())
        parts += ["", legend, f"parameters: {told}"]
    parts += reasons
    return to_text(*parts)
