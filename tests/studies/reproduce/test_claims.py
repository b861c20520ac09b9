"""The claims are whole, and a verdict follows from its rule."""

from dataclasses import replace
from pathlib import Path

import pytest

from unimatrix.baselines.transformers_models import build_gelu_transformer
from unimatrix.configuration import UniMatrixConfig
from unimatrix.errors import InputError
from unimatrix.presets import PRESETS
from unimatrix.reports.claims_report import (
    summarize_claims,
    tabulate_claims,
    tabulate_throughput,
    write_claims_report,
)
from unimatrix.studies.recall.run import build_recall_config
from unimatrix.studies.recall.slices import build_slices
from unimatrix.studies.records import read_records
from unimatrix.studies.reproduce.claims import (
    BETTER,
    GROUPS,
    NOT_REPRODUCED,
    REPRODUCED,
    Claim,
    choose_groups,
    decide,
    judge_claims,
    list_cells,
    load_claims,
    name_run,
)
from unimatrix.studies.reproduce.run import build_recipe

RESULTS = Path(__file__).parents[3] / "results"
CLAIM = Claim(
    cell="recall/core", name="core", metric="accuracy/4", published=0.5, tolerance=0.1, source="x"
)


def make_record(**results: object) -> dict[str, object]:
    return {"status": "done", "results": {"train_s": 10.0, **results}}


def test_every_table_of_the_paper_has_claims() -> None:
    cells, claims = load_claims()
    assert {claim.group for claim in claims} == set(GROUPS)
    assert {claim.cell for claim in claims} == set(cells)
    assert len({(claim.group, claim.name) for claim in claims}) == len(claims)
    for cell in cells.values():
        assert cell.model in (*PRESETS, "transformer", "all"), cell
        assert len(cell.seeds) == (1 if cell.folder == "sizes" else 3), cell


def test_the_published_tables_are_the_papers() -> None:
    """Spot checks against the paper's figures, one a table."""
    _, claims = load_claims()
    published = {(claim.group, claim.name): claim.published for claim in claims}
    assert published["lm", "transformer"] == 5.124
    assert published["lm", "discovery, parameters"] == 115_184
    assert published["recall", "sparsepointer, dropout 0.1"] == 0.756
    assert published["slots", "16 slots: 6 bindings"] == 0.175
    assert published["slots", "32 slots, no write gate: 8 bindings"] == 1
    assert published["triple", "transformer: gate"] == 0.074


@pytest.mark.parametrize("cell", list_cells(["slots"]), ids=lambda cell: cell.folder)
def test_the_ablation_changes_what_it_names(cell) -> None:
    recipe = build_recipe(cell, cell.seeds[0])
    config = build_recall_config(recipe, build_slices(recipe))
    published = UniMatrixConfig.preset("sparsepointer")
    assert config.num_slots == (cell.num_slots or published.num_slots)
    assert config.pointer == ("no-pointer" not in cell.folder)
    assert config.write_gate == ("no-write-gate" not in cell.folder)
    assert (recipe.steps, recipe.batch_size, recipe.learning_rate) == (200, 32, 3e-4)


@pytest.mark.parametrize(
    ("values", "changes", "verdict"),
    [
        ([], {}, "not run"),
        ([0.5], {}, REPRODUCED),
        ([0.41], {}, REPRODUCED),
        ([0.59, 0.61], {}, REPRODUCED),
        ([0.1, 0.9], {}, REPRODUCED),
        ([0.61], {}, BETTER),
        ([0.39], {}, NOT_REPRODUCED),
        ([0.61], {"lower_is_better": True}, NOT_REPRODUCED),
        ([0.39], {"lower_is_better": True}, BETTER),
        ([0.49], {"is_upper_bound": True, "tolerance": 0.0}, REPRODUCED),
        ([0.2, 0.9], {"is_upper_bound": True, "tolerance": 0.0}, BETTER),
    ],
)
def test_verdicts(values, changes, verdict) -> None:
    assert decide(replace(CLAIM, **changes), values) == verdict


def test_records_become_outcomes() -> None:
    cell = load_claims()[0]["recall/core"]
    records = {
        name_run(cell, cell.seeds[0]): make_record(accuracy={"4": 0.13}),
        name_run(cell, cell.seeds[1]): make_record(accuracy={"4": 0.15}),
        name_run(cell, cell.seeds[2]): make_record(accuracy={"4": 0.9}) | {"status": "failed"},
        name_run(cell, 99): make_record(accuracy={"4": 0.8}),
    }
    outcomes = judge_claims(records, ["recall"])
    (core,) = [one for one in outcomes if one.claim.cell == "recall/core"]
    assert (core.values, core.seeds) == ([0.13, 0.15], cell.seeds[:2])
    assert (core.seconds, core.verdict) == (10.0, REPRODUCED)
    table = tabulate_claims(outcomes)
    rows = {row[0]: dict(zip(table.header, row, strict=True)) for row in table.rows}
    row = rows["core, dropout 0.1"]
    assert (row["published"], row["ours, each seed"]) == ("13.4", "13.0, 15.0")
    assert (row["mean"], row["verdict"], row["training s"]) == ("14.0", REPRODUCED, "10")
    assert rows["rosa, dropout 0.1"]["verdict"] == "not run"
    summary = summarize_claims(outcomes)
    assert summary["verdicts"] == {"not run": len(outcomes) - 1, REPRODUCED: 1}


def test_recorded_runs_are_read() -> None:
    """The records of this checkout count as cells, so nothing is trained twice."""
    outcomes = judge_claims(read_records(RESULTS), ["lm", "recall"])
    found = {one.claim.name: len(one.values) for one in outcomes}
    assert found["core"] == found["sparsepointer, dropout 0"] == 3


def test_throughput_is_tabulated() -> None:
    speeds = {"core": {"64": 1000.0, "512": 2000.0}}
    (cell,) = list_cells(["throughput"])
    records = {name_run(cell, seed): make_record(tokens_per_s=speeds) for seed in cell.seeds}
    assert tabulate_throughput(records) == (
        ["tokens a second", "64 tokens", "512 tokens"],
        [["core", "1,000", "2,000"]],
    )
    assert tabulate_throughput({}).rows == []


def test_the_page_holds_every_claim(tmp_path) -> None:
    records = read_records(RESULTS)
    path = tmp_path / "reproduce.html"
    write_claims_report(records, path)
    text = path.read_text(encoding="utf-8")
    for outcome in judge_claims(records):
        assert outcome.claim.name in text
    assert path.with_suffix(".png").is_file()
    assert "https://" not in text
    with pytest.raises(InputError, match="no claim was run"):
        write_claims_report({}, path)


def test_parts_are_chosen_by_name() -> None:
    assert choose_groups([]) == GROUPS
    assert choose_groups(["triple,lm", "slots"]) == ("lm", "slots", "triple")
    with pytest.raises(InputError, match=r"unknown part 'recal'.*Did you mean 'recall'"):
        choose_groups(["recal"])


def test_the_papers_transformer_on_recall_has_its_published_size() -> None:
    recipe = replace(build_recipe(list_cells(["recall"])[0], 19), preset="core")
    config = build_recall_config(recipe, build_slices(recipe))
    assert build_gelu_transformer(config, max_tokens=128).num_parameters() == 162_368
