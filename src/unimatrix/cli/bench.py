"""``unimatrix bench``: milliseconds of a train step beside a Transformer of the same size."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from unimatrix.cli.common import JsonOption, emit, make_log
from unimatrix.errors import InputError


def run(
    preset: Annotated[
        list[str] | None,
        typer.Option("--preset", help="Preset to time; repeat for several. [default: all]"),
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", min=2, help="Tokens a sequence.")] = 128,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Sequences a train step.")
    ] = 16,
    rounds: Annotated[
        int, typer.Option("--rounds", min=1, help="Rounds counted; each times every model once.")
    ] = 30,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="CPU threads. [default: all cores]")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="New folder to write record.json to.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of weights and tokens.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Time a train step of presets and of a Llama of the same width and depth, interleaved.

    Published size, float32, dropout 0, on the CPU. The ratio is to the Llama's time in the same
    round, so it holds when the machine's speed drifts.
    """
    from rich.progress import Progress

    from unimatrix.configuration import PRESETS, UniMatrixConfig

    names = preset or list(PRESETS)
    for name in names:
        UniMatrixConfig.preset(name)
    if len(set(names)) < len(names):
        raise InputError(f"--preset {', '.join(names)} names a preset twice; name each once")

    import torch

    from unimatrix.bench.train_step import time_train_steps
    from unimatrix.run_folder import create_run_folder, describe_run, write_record

    if out is not None:
        create_run_folder(out, "bench")
    if threads is not None:
        torch.set_num_threads(threads)
    with Progress(console=make_log(), transient=True) as progress:
        bar = progress.add_task("timing", total=rounds + 2)
        timings = time_train_steps(
            names,
            tokens,
            batch_size,
            num_rounds=rounds,
            seed=seed,
            on_round=lambda done: progress.update(bar, completed=done),
        )
    result = {
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "train_step": [dataclasses.asdict(timing) for timing in timings],
    }
    if out is not None:
        write_record(out, {**describe_run("cpu"), "seed": seed, "results": result})
    emit(result, as_json, _render)


def _render(result: dict[str, Any]) -> str:
    """Return the timings as an aligned table."""
    first = result["train_step"][0]
    lines = [
        f"train step, {first['num_tokens']} tokens x {first['batch_size']}, float32, dropout 0, "
        f"{result['threads']} threads, {result['rounds']} interleaved rounds",
        f"{'model':<18}{'parameters':>11}{'median ms':>11}{'fastest':>9}{'slowest':>9}{'ratio':>8}",
    ]
    lines += [
        f"{row['model']:<18}{row['parameters']:>11,}{row['median_ms']:>11.1f}"
        f"{row['fastest_ms']:>9.1f}{row['slowest_ms']:>9.1f}{row['ratio']:>8.2f}"
        for row in result["train_step"]
    ]
    return "\n".join(lines)
