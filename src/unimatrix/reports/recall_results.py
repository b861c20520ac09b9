"""Results of recall runs by task and configuration, and the published points beside them."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unimatrix.errors import InputError

# Fields of a result that the report reads.
_REQUIRED = (
    "task",
    "accuracy",
    "mean_accuracy",
    "copy_rules",
    "parameters",
    "state_bytes",
    "state_bytes_by_part",
    "train_s",
    "recipe",
)
# Recipe fields that every name already says, or that do not make a configuration.
_UNNAMED = ("task", "preset", "num_slots", "seed")


PUBLISHED_SOURCE = (
    "the MQAR experiments of HazyResearch/zoology (the grid of Figure 2 of Based, "
    "arXiv:2402.18668), best learning rate, read off its plot zoology_results.png to within 0.005"
)
# State is 4 bytes an element at 1,024 tokens, convolution included. The plot over-counts the state
# of the last two points of RWKV-7 4 and 16 times; here they stand where they belong. Attention at
# 1,020 KiB and Gated DeltaNet at 259 KiB are partly hidden behind other points.
PUBLISHED_MQAR_B: Mapping[str, Sequence[tuple[float, float]]] = {
    "DeltaNet": ((8.7, 0.793), (33, 0.963), (131, 0.995)),
    "Gated DeltaNet": ((16.7, 0.890), (65, 0.988), (259, 0.993)),
    "RWKV-7": ((16.7, 0.816), (33, 0.914), (64, 0.980)),
    "Based": (
        *((9.1, 0.67), (12, 0.72), (24, 0.84), (40, 0.91)),
        *((78, 0.99), (165, 0.99), (283, 1.0)),
    ),
    "Mamba-2": (
        *((8, 0.52), (16, 0.69), (24, 0.73), (32, 0.78)),
        *((48, 0.80), (64, 0.83), (96, 0.84)),
    ),
    "Attention": ((508, 1.0), (1020, 1.0)),
}
"""(KiB of state, accuracy as the mean of 7 slices) of models on MQAR grid B."""
# 256 pairs of a 12-bit key and a 12-bit value, listed.
INFORMATION_LIMIT_BYTES = 768


@dataclass(frozen=True)
class Configuration:
    """Runs of one task that differ in nothing but their seed."""

    name: str
    """Preset, slots, and what sets it apart from the task's other configurations."""
    runs: tuple[Mapping[str, Any], ...]
    """At least one, in the order given."""

    @property
    def slices(self) -> list[str]:
        """Names of the tests, in order."""
        return list(self.runs[0]["accuracy"])

    @property
    def state_bytes(self) -> int:
        """State at batch 1, the same in every run."""
        return int(self.runs[0]["state_bytes"])

    @property
    def mean_accuracies(self) -> list[float]:
        """Mean over the slices, one a run."""
        return [float(run["mean_accuracy"]) for run in self.runs]

    def accuracies(self, name: str) -> list[float]:
        """Return the accuracies on a slice, one a run."""
        return [float(run["accuracy"][name]) for run in self.runs]


def group_results(results: Sequence[Mapping[str, Any]]) -> dict[str, list[Configuration]]:
    """Return the configurations of every task, in the order in which they are first met.

    Args:
        results: the JSON of recall runs, as ``run_recall`` returns it.

    Raises:
        InputError: if there is no result, or one lacks a field.
    """
    if not results:
        raise InputError("there are 0 recall results to report; pass at least one")
    tasks: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for index, result in enumerate(results):
        _check(index, result)
        groups = tasks.setdefault(str(result["task"]), {})
        groups.setdefault(_identify(result), []).append(result)
    return {task: _name_groups(list(groups.values())) for task, groups in tasks.items()}


def list_slices(configurations: Sequence[Configuration]) -> list[str]:
    """Return the tests of any configuration, in the order in which they are first met."""
    return list(dict.fromkeys(name for each in configurations for name in each.slices))


def list_copy_rules(configurations: Sequence[Configuration]) -> list[str]:
    """Return the copy rules of any test of any run, in the order in which they are first met."""
    return list(
        dict.fromkeys(
            rule
            for configuration in configurations
            for run in configuration.runs
            for rules in run["copy_rules"].values()
            for rule in rules
        )
    )


def find_copy_rules(result: Mapping[str, Any], name: str) -> Mapping[str, float]:
    """Return what the copy rules reach in a test, whatever the slots of the model in it.

    Args:
        result: of one run.
        name: of the test, such as ``64x4`` or ``64x4 in 256 slots``.
    """
    rules: Mapping[str, float] = result["copy_rules"].get(name.split(" in ")[0], {})
    return rules


def average_copy_rule(
    configurations: Sequence[Configuration], rule: str, slices: Sequence[str]
) -> float | None:
    """Return the accuracy of a copy rule: the mean over runs and slices.

    Returns:
        A fraction, or ``None`` if a slice has no measurement: a mean of the others would flatter.
    """
    by_slice = []
    for name in slices:
        shares = [
            float(rules[rule])
            for configuration in configurations
            for run in configuration.runs
            if rule in (rules := find_copy_rules(run, name))
        ]
        if not shares:
            return None
        by_slice.append(statistics.mean(shares))
    return statistics.mean(by_slice)


def name_rule(rule: str) -> str:
    """Return a copy rule's name for a reader."""
    return f"copy: {rule.replace('_', ' ')}"


def format_fraction(value: float) -> str:
    """Return four decimals, never rounded up to 1."""
    text = f"{value:.4f}"
    return "> 0.9999" if text == "1.0000" and value < 1 else text


def _check(index: int, result: Mapping[str, Any]) -> None:
    missing = [field for field in _REQUIRED if field not in result]
    if missing:
        raise InputError(
            f"recall result {index} lacks {', '.join(missing)}; pass what a recall run returned"
        )
    if not result["accuracy"]:
        raise InputError(f"recall result {index} has no test; pass what a recall run returned")
    if result["state_bytes"] < 1:
        raise InputError(
            f"state_bytes of recall result {index} is {result['state_bytes']}; "
            "it must be at least 1"
        )


def _identify(result: Mapping[str, Any]) -> str:
    """Return a text that is the same for two runs if they may be averaged."""
    recipe = {field: value for field, value in result["recipe"].items() if field != "seed"}
    measured = [result["parameters"], result["state_bytes"], list(result["accuracy"])]
    return json.dumps([recipe, measured], sort_keys=True, default=str)


def _name_groups(groups: Sequence[Sequence[Mapping[str, Any]]]) -> list[Configuration]:
    """Return the groups of a task with names that tell them apart."""
    recipes = [group[0]["recipe"] for group in groups]
    fields = dict.fromkeys(field for recipe in recipes for field in recipe if field not in _UNNAMED)
    differing = [
        field
        for field in fields
        if len({json.dumps(recipe.get(field), default=str) for recipe in recipes}) > 1
    ]
    names: list[str] = []
    for recipe in recipes:
        parts = [str(recipe.get("preset", "model"))]
        if recipe.get("num_slots") is not None:
            parts.append(f"{recipe['num_slots']} slots")
        parts += [f"{field.replace('_', ' ')} {recipe.get(field)}" for field in differing]
        names.append(", ".join(parts))
    return [
        Configuration(f"{name} #{same + 1}" if (same := names[:i].count(name)) else name, tuple(g))
        for i, (name, g) in enumerate(zip(names, groups, strict=True))
    ]
