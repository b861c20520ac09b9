"""``unimatrix bench``: a train step or a new token beside a Transformer of the same size."""

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
    decode: Annotated[
        bool, typer.Option("--decode", help="Time new tokens instead of a train step.")
    ] = False,
    tokens: Annotated[
        int | None,
        typer.Option(
            "--tokens",
            min=2,
            help="Tokens a sequence, or of the prompt. \\[default: 128; with --decode 1,000]",
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size",
            min=1,
            help="Sequences at once. \\[default: 16; with --decode 1]",
        ),
    ] = None,
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
    round, so it holds when the machine's speed drifts. --decode times the tokens that generate
    writes after a prompt, greedily and with a cache on both sides; its ratio is how many times
    faster than the Llama.
    """
    from rich.progress import Progress

    from unimatrix.configuration import PRESETS, UniMatrixConfig

    names = preset or list(PRESETS)
    for name in names:
        UniMatrixConfig.preset(name)
    if len(set(names)) < len(names):
        raise InputError(f"--preset {', '.join(names)} names a preset twice; name each once")

    import torch

    from unimatrix.bench.decode import time_decoding
    from unimatrix.bench.train_step import time_train_steps
    from unimatrix.run_folder import create_run_folder, describe_run, write_record

    if out is not None:
        create_run_folder(out, "bench")
    if threads is not None:
        torch.set_num_threads(threads)
    with Progress(console=make_log(), transient=True) as progress:
        bar = progress.add_task("timing", total=rounds + (1 if decode else 2))
        time_models: Any = time_decoding if decode else time_train_steps
        timings = time_models(
            names,
            tokens or (1000 if decode else 128),
            batch_size or (1 if decode else 16),
            num_rounds=rounds,
            seed=seed,
            on_round=lambda done: progress.update(bar, completed=done),
        )
    result = {
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "decode" if decode else "train_step": [dataclasses.asdict(timing) for timing in timings],
    }
    if out is not None:
        write_record(out, {**describe_run("cpu"), "seed": seed, "results": result})
    emit(result, as_json, _render_decode if decode else _render)


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


def _render_decode(result: dict[str, Any]) -> str:
    """Return the timings as an aligned table."""
    first = result["decode"][0]
    lines = [
        f"a new token of {first['batch_size']} streams after {first['prompt_tokens']:,}, greedy, "
        f"float32, {result['threads']} threads, {result['rounds']} interleaved rounds of "
        f"{first['new_tokens']}",
        f"{'model':<18}{'parameters':>11}{'median us':>11}{'fastest':>9}{'slowest':>9}{'gain':>8}",
    ]
    lines += [
        f"{row['model']:<18}{row['parameters']:>11,}{row['median_us']:>11.1f}"
        f"{row['fastest_us']:>9.1f}{row['slowest_us']:>9.1f}{row['speedup']:>7.1f}x"
        for row in result["decode"]
    ]
    return "\n".join(lines)
