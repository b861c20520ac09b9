"""``unimatrix train``: train on a corpus, validate, and say what to type next."""

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from unimatrix.cli.common import (
    DeviceOption,
    JsonOption,
    SeedOption,
    compare_with_xz,
    emit,
    make_log,
    pick_device,
)
from unimatrix.cli.terminal import show_bytes
from unimatrix.errors import InputError
from unimatrix.train.recipe import (
    DEFAULT_RECIPE,
    Recipe,
    describe_key,
    find_difference,
    list_recipes,
    load_recipe,
    make_paths_absolute,
    override,
    replace_fields,
)

if TYPE_CHECKING:
    from unimatrix.train.run import TrainingRun


RecipeArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="[RECIPE]",
        help=f"A .toml file, or a shipped recipe: {', '.join(list_recipes())}; without it, "
        f"{DEFAULT_RECIPE}.",
    ),
]
PresetOption = Annotated[
    str | None,
    typer.Option("--preset", help=f"{describe_key('model.preset')} See `unimatrix info`."),
]
DataOption = Annotated[
    list[str] | None, typer.Option("--data", help=f"{describe_key('data.data')} Repeatable.")
]
ValidDataOption = Annotated[
    list[str] | None, typer.Option("--valid-data", help=describe_key("data.valid_data"))
]
MinutesOption = Annotated[
    float | None, typer.Option("--minutes", help=describe_key("train.minutes"))
]
OutOption = Annotated[
    Path | None,
    typer.Option("--out", help="Run folder to create; without it, runs/PRESET-CORPUS-N."),
]
ResumeOption = Annotated[
    bool, typer.Option("--resume", help="Continue the interrupted run in --out, exactly.")
]
AssignmentsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change any other field, such as train.learning_rate=1e-3 or "
        "model.hidden_size=128; --dry-run lists them. Repeatable.",
    ),
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Print the resolved recipe and do nothing else.")
]


def run(
    recipe: RecipeArgument = None,
    *,
    preset: PresetOption = None,
    data: DataOption = None,
    valid_data: ValidDataOption = None,
    minutes: MinutesOption = None,
    steps: Annotated[int | None, typer.Option("--steps", help=describe_key("train.steps"))] = None,
    out: OutOption = None,
    resume: ResumeOption = False,
    init: Annotated[str | None, typer.Option("--init", help=describe_key("model.init"))] = None,
    assignments: AssignmentsOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
    device: DeviceOption = "auto",
    seed: SeedOption = None,
) -> None:
    """Train a byte-level model, validate it beside xz, and let it write.

    Without arguments: five minutes of training on the sources of Python's standard library. The
    budget covers training; set-up and validation come on top. Ctrl-C saves a checkpoint (exit code
    1). torchrun --nproc-per-node N --no-python unimatrix train ... trains data-parallel.
    """
    flags = {
        "model.preset": preset,
        "model.init": init,
        "data.data": data,
        "data.valid_data": valid_data,
        "train.minutes": minutes,
        "train.steps": steps,
        "train.seed": seed,
    }
    chosen = {key: value for key, value in flags.items() if value not in (None, [])}
    resolved = _resolve(recipe, chosen, assignments or [], out if resume else None)
    if resume and out is None:
        raise InputError("--resume needs the run to continue; name its folder with --out DIR")
    if dry_run:
        _check_model(resolved)
        emit(resolved.to_dict(), as_json, _render_recipe)
        return
    _train(resolved, out, resume=resume, device=pick_device(device), as_json=as_json)


def _resolve(
    name: str | None, chosen: dict[str, Any], assignments: list[str], resumed: Path | None
) -> Recipe:
    """Return the recipe after flags and ``--set``; that of a resumed run must not change."""
    stored = None
    if resumed is not None:
        from unimatrix.train.run_folder import read_run

        stored, _ = read_run(resumed)
    base = stored if name is None and stored is not None else load_recipe(name or DEFAULT_RECIPE)
    resolved = override(replace_fields(base, chosen), assignments)
    changed = None
    if stored is not None:
        changed = find_difference(make_paths_absolute(resolved), make_paths_absolute(stored))
    if changed is not None:
        raise InputError(
            f"{changed} differs from the run in {resumed}, which resumes with its own recipe only; "
            "leave the argument out, or start a new run"
        )
    return resolved


def _check_model(recipe: Recipe) -> None:
    """Raise ``InputError`` unless the recipe's model can be built."""
    from unimatrix.configuration import UniMatrixConfig
    from unimatrix.hub.load import load_config
    from unimatrix.train.run import require_room

    if recipe.model.init is not None:
        config = load_config(recipe.model.init)
    else:
        assert recipe.model.preset is not None
        config = UniMatrixConfig.preset(recipe.model.preset, **recipe.model.overrides)
    require_room(config, recipe.data.window_tokens)


def _train(recipe: Recipe, out: Path | None, *, resume: bool, device: str, as_json: bool) -> None:
    """Run the recipe and print the result in the main process."""
    from unimatrix.train.processes import is_main_process, join_processes
    from unimatrix.train.run import hold_run, prepare_resumed_run, prepare_run, start_run

    log = make_log()
    if resume:
        assert out is not None
        join_processes(device)
        with hold_run(out):
            _train_and_judge(prepare_resumed_run(out, device), log, as_json=as_json)
        return
    run = prepare_run(recipe, out, device)
    log.quiet = not is_main_process()
    start_run(run, lambda sentence: log.print(escape(sentence)))
    assert run.path is not None
    with hold_run(run.path):
        _train_and_judge(run, log, as_json=as_json)


def _train_and_judge(run: "TrainingRun", log: Console, *, as_json: bool) -> None:
    """Train, then validate and print the result in the main process."""
    from unimatrix.train.judge import judge_run
    from unimatrix.train.processes import is_main_process

    main = is_main_process()
    log.quiet = not main
    if not _train_visibly(run, log):
        raise typer.Exit(1)
    if main:
        log.print("validating ...")
        emit(judge_run(run), as_json, _render_result)


def _train_visibly(run: "TrainingRun", log: Console) -> bool:
    """Train with a progress bar; return whether it came to its end."""
    from unimatrix.cli.progress import TrainingProgress
    from unimatrix.evaluation.units import to_bits_per_byte
    from unimatrix.train.callbacks import StopOnSignal
    from unimatrix.train.run import train_run

    scale = to_bits_per_byte(1.0, 1)
    progress = TrainingProgress(log, loss_scale=scale, loss_unit="bits per byte")
    try:
        with StopOnSignal() as stop:
            result = train_run(
                run,
                callbacks=[progress, stop],
                on_metrics=progress.show_metrics,
                say=lambda sentence: log.print(escape(sentence)),
            )
    finally:
        progress.close()
    if result.interrupted:
        log.print(
            f"[bold]interrupted[/] after step {result.num_optim_steps:,} of {run.num_steps:,}; the "
            "checkpoint is saved, continue with\n"
            + escape(f"  unimatrix train --resume --out {shlex.quote(str(run.path))}")
        )
    return not result.interrupted


def _render_recipe(values: dict[str, Any]) -> str:
    """Return a recipe as TOML with the help of every field above it."""
    lines = []
    for section, fields in values.items():
        lines += ["", f"[{section}]"]
        for name, value in fields.items():
            lines.append(f"# {describe_key(f'{section}.{name}')}")
            if isinstance(value, dict):
                pairs = ", ".join(f"{key} = {_render_value(v)}" for key, v in value.items())
                lines.append(f"{name} = {{ {pairs} }}" if pairs else f"{name} = {{}}")
            else:
                lines.append(f"{name} = {_render_value(value)}")
    return "\n".join(lines[1:])


def _render_value(value: Any) -> str:
    return '"none"' if value is None else json.dumps(value)


def _render_result(result: dict[str, Any]) -> str:
    """Return the end of a training for people."""
    ours, xz = result["bits_per_byte"], result["xz_bits_per_byte"]
    folder = shlex.quote(result["run"])
    name = ", ".join(result["data"])
    lines = [
        compare_with_xz(ours, xz, is_primed=result["prime_bytes"] > 0),
        f"  on the first {result['valid_bytes']:,} validation bytes of {name}, "
        f"context {result['context']}",
        f"trained        {result['optim_steps']:,} steps, {result['tokens']:,} tokens, "
        f"{result['train_s']:.1f} s, {result['parameters']:,} parameters",
        f"run folder     {result['run']}",
    ]
    if result["answers"] is not None:
        shares = {name: 100 * found["all"] for name, found in result["answers"].items()}
        lines.append(
            f"right answers  {shares['grammar']:.0f} % in the words of training, "
            f"{shares['unseen']:.0f} % in others, to questions about unseen documents"
        )
    if result["sample"] is not None:
        begun, written = (show_bytes(part.encode()) for part in result["sample"].values())
        lines += ["", "a sample (prompt | continuation):", f"{begun}|{written}"]
    prompt = "def " if result["data"] == ["pystdlib"] else "The "
    prime = "".join(f" --prime {shlex.quote(item)}" for item in result["prime"])
    lines += [
        "",
        "next:",
        f'  unimatrix generate {folder} "{prompt}"{prime}',
        f"  unimatrix eval {folder}{prime}",
    ]
    if result["document_share"] > 0:
        lines.append(f'  unimatrix ask "QUESTION" --file FILE --model {folder}')
    return "\n".join(lines)
