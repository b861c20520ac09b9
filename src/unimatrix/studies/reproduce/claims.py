"""The published claims, read from ``claims.toml``; loads neither torch nor transformers."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any, NamedTuple

from unimatrix.errors import require_choice
from unimatrix.studies.records import Records
from unimatrix.studies.sections import build_section
from unimatrix.train.field_types import parse_toml

GROUPS = ("lm", "recall", "slots", "triple", "throughput")
REPRODUCED, BETTER, NOT_REPRODUCED = "reproduced", "better", "not reproduced"
VERDICT_RULE = (
    "Reproduced: the published value, a single run, lies inside the range of our seeds, or outside "
    "by the tolerance at most. Otherwise better or not reproduced, by our mean. A bound is "
    "reproduced when our mean keeps it and better when it does not."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClaimCell:
    """What is trained once a seed."""

    folder: str
    """Where its records lie: FOLDER/seed-N."""
    group: str
    """One of `GROUPS`: what kind of run it is."""
    model: str
    """A preset, or `transformer`: the paper's."""
    seeds: list[int] = field(default_factory=list)
    """Seeds; the first is the paper's."""
    dropout: float = 0.1
    """Dropout in training of recall."""
    num_slots: int | None = None
    """Slots, where they are not the preset's."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Configuration fields that differ from the preset."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """One published value."""

    cell: str
    """Folder of the cell that tests it."""
    name: str
    """What was measured."""
    metric: str
    """Where the cell's results hold our value: keys with slashes between."""
    published: float
    """The paper's value; a fraction for accuracies."""
    tolerance: float
    """How far the published run may lie outside the range of our seeds."""
    source: str
    """Where it was published."""
    group: str = ""
    """The table that it stands in; empty is the cell's."""
    causal_code: float | None = None
    """What the published code gives once it is causal, one seed."""
    lower_is_better: bool = False
    """Bits and parameters: less is better."""
    is_upper_bound: bool = False
    """The claim is that the value lies below the published one."""
    note: str = ""
    """What a reader must know to compare."""


class Outcome(NamedTuple):
    """A claim beside what we found.

    Attributes:
        claim: what was published.
        values: ours, one a seed, in the order of the cell's seeds.
        seeds: those that are there.
        seconds: mean seconds of a run, training only.
        verdict: one of the three, or ``not run``.
    """

    claim: Claim
    values: list[float]
    seeds: list[int]
    seconds: float | None
    verdict: str


@cache
def load_claims() -> tuple[Mapping[str, ClaimCell], tuple[Claim, ...]]:
    """Return the cells by folder and all claims, in the order of the tables."""
    path = resources.files("unimatrix") / "studies" / "reproduce" / "claims.toml"
    values = parse_toml(path.read_text(encoding="utf-8"), path.name)
    cells = {
        folder: build_section(ClaimCell, content, f"cells.{folder}.", folder=folder)
        for folder, content in values["cells"].items()
    }
    claims = tuple(build_section(Claim, content, "claims.") for content in values["claims"])
    for claim in claims:
        assert claim.cell in cells, claim
    # A claim stands in its cell's table unless it says otherwise.
    return cells, tuple(
        dataclasses.replace(claim, group=claim.group or cells[claim.cell].group) for claim in claims
    )


def choose_groups(names: Sequence[str]) -> tuple[str, ...]:
    """Return the groups that ``--only`` names, in the order of the tables.

    Args:
        names: groups, several in one text with commas between; empty is all.

    Raises:
        InputError: for an unknown group.
    """
    wanted = [name.strip() for text in names for name in text.split(",") if name.strip()]
    for name in wanted:
        require_choice("unknown part", name, GROUPS)
    return tuple(group for group in GROUPS if group in (wanted or GROUPS))


def list_cells(groups: Sequence[str]) -> list[ClaimCell]:
    """Return the cells that the claims of some groups need, in order."""
    cells, claims = load_claims()
    needed = dict.fromkeys(claim.cell for claim in claims if claim.group in groups)
    return [cells[folder] for folder in needed]


def name_run(cell: ClaimCell, seed: int) -> str:
    """Return the folder of one run of a cell."""
    return f"{cell.folder}/seed-{seed}"


def judge_claims(records: Records, groups: Sequence[str] = GROUPS) -> list[Outcome]:
    """Return every claim of some groups beside what the records say, by folder."""
    cells, claims = load_claims()
    outcomes = []
    for claim in claims:
        if claim.group not in groups:
            continue
        cell = cells[claim.cell]
        by_seed = {seed: records.get(name_run(cell, seed)) for seed in cell.seeds}
        runs = {seed: run for seed, run in by_seed.items() if run and run["status"] == "done"}
        values = [value for run in runs.values() if (value := _read(run, claim)) is not None]
        seconds = [
            (run if "train_s" in run else run["results"])["train_s"] for run in runs.values()
        ]
        mean = statistics.mean(map(float, seconds)) if seconds else None
        outcomes.append(Outcome(claim, values, list(runs), mean, decide(claim, values)))
    return outcomes


def decide(claim: Claim, values: Sequence[float]) -> str:
    """Return the verdict on a claim, by ``VERDICT_RULE``, of our values by seed."""
    if not values:
        return "not run"
    mean = statistics.mean(values)
    if claim.is_upper_bound:
        return REPRODUCED if mean < claim.published else BETTER
    lowest, highest = min(values) - claim.tolerance, max(values) + claim.tolerance
    if lowest <= claim.published <= highest:
        return REPRODUCED
    return BETTER if (mean < claim.published) == claim.lower_is_better else NOT_REPRODUCED


def _read(run: Mapping[str, Any], claim: Claim) -> float | None:
    """Return our value; ``None`` where an older record does not hold it."""
    value: Any = run["results"]
    for key in claim.metric.split("/"):
        if key not in value:
            return None
        value = value[key]
    return float(value)
