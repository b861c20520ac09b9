"""The measured results that the README shows, each with its state and the parts that are off."""

from collections.abc import Mapping
from typing import Any

from unimatrix.presets import PRESETS
from unimatrix.train.recipe import load_recipe

HEADER = ["question", "ours", "beside it", "state bytes", "parts of the preset that are off"]
_PRESET = PRESETS["unimatrix"]
_OFF = {
    "matrix state": ("update_rules", "none"),
    "convolution": ("conv_kernel", 0),
    "slots": ("associative_memory", "none"),
    "automaton": ("residual_path", "none"),
}
_WIRING = ("slot_key_patterns", "slot_read_offsets", "slot_source")

Records = Mapping[str, dict[str, Any]]


def list_parts_off(overrides: Mapping[str, Any]) -> str:
    """Return which parts of the preset ``unimatrix`` an experiment switched off or wired anew.

    Args:
        overrides: configuration fields that differ from the preset.
    """
    off = [part for part, (name, value) in _OFF.items() if overrides.get(name) == value]
    if "matrix state" in off:
        off.insert(1, "its convolution")
    rewired = any(name in overrides and overrides[name] != _PRESET[name] for name in _WIRING)
    if rewired and "slots" not in off:
        off.append("slots' keys set for the task")
    return ", ".join(off) or "none"


def tabulate_headline(records: Records) -> list[list[str]]:
    """Return the rows of ``HEADER``.

    Args:
        records: by folder below ``results/``.
    """
    return [
        *_tabulate_language(records),
        *_tabulate_recall(records),
        *_tabulate_speed(records),
    ]


def _tabulate_language(records: Records) -> list[list[str]]:
    default = records["train/default"]["results"]
    bounded = records["books/middlemarch-bounded"]["results"]
    compressors = records["books/middlemarch"]["results"]["compressors"]
    ours, peer = (
        records[f"compare/small/parameters/pystdlib/{name}"]
        for name in ("unimatrix", "gated-deltanet")
    )
    return [
        [
            "two minutes of training on Python's sources, bits per byte",
            f"{default['bits_per_byte']:.3f}",
            f"xz {default['xz_bits_per_byte']:.3f}",
            f"{default['state_bytes']:,}",
            list_parts_off(_read_overrides("default")),
        ],
        [
            "the same text, equal parameters and steps as a Gated DeltaNet, bits per byte",
            f"{ours['results']['test_bits_per_byte']:.3f}",
            f"{peer['results']['test_bits_per_byte']:.3f} ({peer['num_optim_steps']} of "
            f"{ours['num_optim_steps']} steps)",
            f"{max(ours['results']['state_bytes'].values()):,}",
            list_parts_off(ours["asked"]["entry"]["overrides"]),
        ],
        [
            "Middlemarch after training on ten other novels, bits per byte",
            f"{bounded['bits_per_byte']:.3f}",
            f"PPMd {compressors['PPMd']['plain']:.3f}, primed with the ten "
            f"{compressors['PPMd']['primed']:.3f}",
            f"{bounded['state_bytes']:,}",
            list_parts_off(_read_overrides("books")),
        ],
    ]


def _tabulate_recall(records: Records) -> list[list[str]]:
    rows = []
    for question, prefix, tests in (
        (
            "associative recall, 8 bindings in 8 slots, per cent",
            "lab/associative/slots/",
            ["8 in 8 slots"],
        ),
        ("MQAR, zoology's grid B, per cent", "lab/mqar/mqar-b/", None),
        (
            "a number in a megabyte of a novel, trained on 1,024 bytes, per cent",
            "lab/others/needle/",
            ["1048576"],
        ),
    ):
        members = [record["results"] for name, record in records.items() if name.startswith(prefix)]
        found = [r["accuracy"][test] for r in members for test in tests or r["accuracy"]]
        rows.append(
            [
                question,
                f"{100 * sum(found) / len(found):.2f} (worst {100 * min(found):.2f})",
                f"{len(members)} seeds",
                f"{members[0]['state_bytes']:,}",
                list_parts_off(members[0]["recipe"]["overrides"]),
            ]
        )
    return rows


def _tabulate_speed(records: Records) -> list[list[str]]:
    rows = []
    for question, run, mode, length in (
        ("decoding a token after 1,024, ms", "streams", "decode", 1024),
        ("train step of 16,384 tokens, ms", "train", "train", 16384),
    ):
        timed = {
            row["model"]: row
            for row in records[f"bench/{run}"]["results"]["rows"]
            if (row["mode"], row["num_tokens"]) == (mode, length)
        }
        ours, llama = timed["unimatrix"], timed["llama"]
        rows.append(
            [
                question,
                _show_ms(ours["median_ms"]),
                f"Llama {_show_ms(llama['median_ms'])}",
                f"{ours['state_bytes']:,} (Llama {llama['state_bytes']:,})",
                list_parts_off({}),
            ]
        )
    return rows


def _show_ms(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _read_overrides(recipe: str) -> Mapping[str, Any]:
    return load_recipe(recipe).model.overrides
