"""``unimatrix info``: what a model or a preset consists of."""

from typing import Annotated, Any

import typer
from rich.markup import escape

from unimatrix.cli.common import (
    DeviceOption,
    JsonOption,
    SeedOption,
    WindowOption,
    emit,
    pick_device,
)
from unimatrix.cli.terminal import to_text
from unimatrix.errors import InputError
from unimatrix.hub.packaged import READER

_MANY_TOKENS = 2048


def run(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL|PRESET",
            help=f"Run folder, saved model, {READER} or preset; nothing lists the presets.",
        ),
    ] = None,
    window: WindowOption = None,
    seed: SeedOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Show the parameters of a model, the bytes it carries from token to token, and its back ends.

    State bytes are those of a real cache at batch 1 after one token; what grows with the text is
    marked. Nothing depends on --seed, which is taken so that every verb has it.
    """
    place = pick_device(device)

    from unimatrix.presets import PRESETS

    if model is None:
        if window is not None:
            raise InputError(f"window is {window}, and no model is named; name one whose it is")
        result = {"presets": [describe_model(name, place) for name in PRESETS]}
        emit(result, as_json, _render_presets)
    else:
        emit(describe_model(model, place, window), as_json, _render_model)


def describe_model(name: str, device: str, window: int | None = None) -> dict[str, Any]:
    """Return what a model consists of, as JSON types."""
    from unimatrix.evaluation.footprint import (
        count_parameters,
        list_growing_parts,
        measure_state_bytes,
    )
    from unimatrix.hub.load import load_config
    from unimatrix.kernels.plan import explain_plan
    from unimatrix.modeling import UniMatrixForCausalLM

    config = load_config(name)
    model = UniMatrixForCausalLM(config).to(device).eval()
    if window is not None:
        model.set_window(window)
    parameters, state_bytes = count_parameters(model), measure_state_bytes(model)
    return {
        "model": name,
        "parameters": sum(parameters.values()),
        "parameters_by_part": parameters,
        "state_bytes": sum(state_bytes.values()),
        "state_bytes_by_part": state_bytes,
        "grows": list_growing_parts(model),
        "depth_steps": config.num_hidden_layers,
        "max_position_embeddings": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
        "device": device,
        "backends": {
            "reading": model.name_backends(_MANY_TOKENS),
            "decoding": model.name_backends(1),
        },
        "not_compiled": {
            "reading": explain_plan(model, _MANY_TOKENS),
            "decoding": explain_plan(model, 1),
        },
    }


def _render_model(result: dict[str, Any]) -> str:
    """Return one model as two tables and a few facts."""
    from rich.table import Table

    sizes = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    sizes.add_column()
    sizes.add_column(justify="right")
    for title, kind in (("parameters", "parameters"), ("state bytes", "state_bytes")):
        sizes.add_row(f"[bold]{title}", f"[bold]{result[kind]:,}")
        for part, count in result[f"{kind}_by_part"].items():
            grows = kind == "state_bytes" and part in result["grows"]
            sizes.add_row(f"  {_spell(part)}", f"{count:,}", "grows with the text" if grows else "")
        sizes.add_row()
    facts = Table.grid(padding=(0, 2))
    rows = result["max_position_embeddings"]
    facts.add_row("depth steps", str(result["depth_steps"]))
    facts.add_row("length", "any" if rows is None else f"at most {rows:,} tokens (position table)")
    facts.add_row("vocabulary", f"{result['vocab_size']:,} ids")
    for use, backends in result["backends"].items():
        chosen = ", ".join(f"{_spell(op)} {name}" for op, name in backends.items())
        facts.add_row(f"{use} on {result['device']}", chosen)
        for part, reason in result["not_compiled"][use].items():
            facts.add_row("", f"not compiled: {_spell(part)} ({reason})")
    return to_text(f"[bold]{escape(result['model'])}[/]", "", facts, "", sizes).rstrip()


def _render_presets(result: dict[str, Any]) -> str:
    """Return the presets as a table."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("preset", no_wrap=True)
    table.add_column("parameters", justify="right")
    table.add_column("state bytes", justify="right")
    table.add_column("carries", overflow="fold")
    for row in result["presets"]:
        carried = [part for part in row["state_bytes_by_part"] if part != "counters"]
        names = [f"{_spell(p)} (grows)" if p in row["grows"] else _spell(p) for p in carried]
        table.add_row(
            row["model"], f"{row['parameters']:,}", f"{row['state_bytes']:,}", ", ".join(names)
        )
    return to_text(
        table,
        "",
        "All: D 64, L 3, vocabulary 259; a position table of 128, but for selective and unimatrix.",
        "State bytes: batch 1, after one token.",
        "Details: unimatrix info PRESET",
    )


def _spell(name: str) -> str:
    """Return an identifier as words."""
    return name.replace("_", " ")
