"""The measured results that the README shows, each with its state and the parts that are off."""

from collections.abc import Mapping
from typing import Any

from unimatrix.presets import PRESETS
from unimatrix.reports.text import Table
from unimatrix.studies.records import Records, select_records
from unimatrix.train.recipe import load_recipe

# What was timed; the records do not say.
_TIMED: tuple[str, dict[str, Any]] = ("selective", {})
_ON = PRESETS["unimatrix"]
_OFF = {
    "matrix state": ("update_rules", "none"),
    "convolution": ("conv_kernel", 0),
    "modulation": ("modulation_size", 0),
    "automaton": ("residual_path", "none"),
}


def list_parts_off(preset: str, overrides: Mapping[str, Any]) -> str:
    """Return which parts of the preset ``unimatrix`` a configuration switches off or replaces.

    Args:
        preset: of the configuration.
        overrides: fields that differ from it.
    """
    fields = PRESETS[preset] | dict(overrides)
    off = [part for part, (name, value) in _OFF.items() if fields.get(name, value) == value]
    if "matrix state" in off:
        off.insert(1, "its convolution")
    memory = fields.get("associative_memory", "none")
    if memory != _ON["associative_memory"]:
        off.append("index" if memory == "none" else "index (slots in its place)")
    return ", ".join(dict.fromkeys(off)) or "none"


def tabulate_headline(records: Records) -> Table:
    """Return the rows that the README shows, from the records by folder below ``results/``."""
    rows = [*_list_language(records), *_list_recall(records), *_list_speed(records)]
    header = ["question", "ours", "beside it", "state bytes", "parts of the preset that are off"]
    return Table(header, rows)


def _list_language(records: Records) -> list[list[str]]:
    default = records["train/default"]["results"]
    bounded = records["books/middlemarch-bounded"]["results"]
    ppmd = records["books/middlemarch"]["results"]["compressors"]["PPMd"]
    ours, peer = (
        records[f"compare/small/parameters/pystdlib/{name}"]
        for name in ("unimatrix", "gated-deltanet")
    )
    steps = f"{peer['num_optim_steps']} of {ours['num_optim_steps']} steps"
    return [
        [
            "five minutes of training on Python's sources, bits per byte",
            f"{default['bits_per_byte']:.3f}",
            f"xz {default['xz_bits_per_byte']:.3f}",
            f"{default['state_bytes']:,}",
            _describe_recipe("default"),
        ],
        [
            "the same text, equal parameters and steps as a Gated DeltaNet, bits per byte",
            f"{ours['results']['test_bits_per_byte']:.3f}",
            f"{peer['results']['test_bits_per_byte']:.3f} ({steps})",
            f"{max(ours['results']['state_bytes'].values()):,}",
            list_parts_off(ours["asked"]["entry"]["preset"], ours["asked"]["entry"]["overrides"]),
        ],
        [
            "Middlemarch after training on ten other novels, bits per byte",
            f"{bounded['bits_per_byte']:.3f}",
            f"PPMd {ppmd['plain']:.3f}, primed with the ten {ppmd['primed']:.3f}",
            f"{bounded['state_bytes']:,}",
            _describe_recipe("books"),
        ],
    ]


def _list_recall(records: Records) -> list[list[str]]:
    needle = "a number in a megabyte of a novel, trained on 1,024 bytes, per cent"
    rows = []
    for question, run, tests in (
        (
            "associative recall, 8 bindings in 8 slots, per cent",
            "associative/slots",
            ["8 in 8 slots"],
        ),
        ("MQAR, zoology's grid B, per cent", "mqar/mqar-b", None),
        (needle, "others/needle", ["1048576"]),
    ):
        seeds = [record["results"] for record in select_records(records, f"lab/{run}/").values()]
        shares = [seed["accuracy"][test] for seed in seeds for test in tests or seed["accuracy"]]
        rows.append(
            [
                question,
                f"{100 * sum(shares) / len(shares):.2f} (worst {100 * min(shares):.2f})",
                f"{len(seeds)} seeds",
                f"{seeds[0]['state_bytes']:,}",
                list_parts_off(seeds[0]["recipe"]["preset"], seeds[0]["recipe"]["overrides"]),
            ]
        )
    return rows


def _list_speed(records: Records) -> list[list[str]]:
    rows = []
    for question, run, place in (
        ("decoding a token after 1,024, ms", "streams", ("decode", 1024)),
        ("train step of 16,384 tokens, ms", "train", ("train", 16384)),
    ):
        timed = {
            row["model"]: row
            for row in records[f"bench/{run}"]["results"]["rows"]
            if (row["mode"], row["num_tokens"]) == place
        }
        ours, llama = timed["unimatrix"], timed["llama"]
        rows.append(
            [
                question,
                _format_ms(ours["median_ms"]),
                f"Llama {_format_ms(llama['median_ms'])}",
                f"{ours['state_bytes']:,} (Llama {llama['state_bytes']:,})",
                list_parts_off(*_TIMED),
            ]
        )
    return rows


def _describe_recipe(name: str) -> str:
    """Return the parts that a recipe of the package switches off."""
    model = load_recipe(name).model
    assert model.preset is not None
    return list_parts_off(model.preset, model.overrides)


def _format_ms(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
