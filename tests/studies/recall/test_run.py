import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from unimatrix.configuration import UniMatrixConfig
from unimatrix.errors import InputError
from unimatrix.evaluation.footprint import measure_state_bytes
from unimatrix.evaluation.recall import measure_recall
from unimatrix.hub.load import load_model
from unimatrix.modeling import UniMatrixForCausalLM
from unimatrix.studies.recall.recipe import RecallRecipe, find_recall_recipe
from unimatrix.studies.recall.run import build_recall_config, run_recall
from unimatrix.studies.recall.slices import build_slices
from unimatrix.tasks import AssociativeRecall

QUICK = RecallRecipe(steps=2, batch_size=4, test_examples=40)
FIELDS = [
    "task",
    "accuracy",
    "mean_accuracy",
    "copy_rules",
    "parameters",
    "state_bytes",
    "state_bytes_by_part",
    "train_s",
    "recipe",
]
SHORT = {"steps": 2, "batch_size": 4, "test_examples": 40}
SELECTIVE = replace(find_recall_recipe("associative", "selective"), **SHORT)


def build_config(**fields: Any) -> UniMatrixConfig:
    """Return the configuration that a recipe of these fields trains."""
    recipe = RecallRecipe(**fields)
    return build_recall_config(recipe, build_slices(recipe))


def test_the_papers_recipe() -> None:
    recipe = find_recall_recipe("associative", "sparsepointer")
    assert recipe == RecallRecipe()
    config = build_config()
    published = {
        "vocab_size": 64,
        "max_position_embeddings": 128,
        "hidden_size": 64,
        "num_slots": 32,
        "slots_per_read": 4,
        "dropout": 0.1,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pointer": True,
    }
    assert {name: getattr(config, name) for name in published} == published
    train = recipe.to_train_section()
    assert (train.steps, train.batch_size, train.learning_rate) == (200, 32, 3e-4)
    assert (train.weight_decay, train.decay_all, train.schedule) == (0.01, True, "constant")
    assert (train.warmup_fraction, train.max_grad_norm, train.seed) == (0, 1.0, 19)
    assert (train.beta1, train.beta2) == (0.9, 0.999)
    assert (recipe.num_pairs, recipe.test_pairs, recipe.test_examples) == (4, (4, 6, 8), 64 * 32)


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [("core", 70_660), ("rosa", 78_916), ("sparsepointer", 75_014)],
)
def test_a_short_run(preset, parameters) -> None:
    recipe = replace(QUICK, preset=preset)
    seen: list[dict[str, float]] = []
    result = run_recall(recipe, on_metrics=seen.append)
    assert list(result) == FIELDS
    assert list(result["accuracy"]) == ["4", "6", "8"]
    assert all(0 <= accuracy <= 1 for accuracy in result["accuracy"].values())
    assert result["parameters"] == parameters
    assert result["state_bytes"] == (29_592 if preset == "sparsepointer" else 12_312)
    assert result["train_s"] > 0
    assert seen[0]["loss_nats"] == pytest.approx(4.16, abs=0.2)
    assert json.loads(json.dumps(result))["recipe"]["seed"] == 19


def test_the_seed_alone_decides() -> None:
    recipe = replace(QUICK, preset="core", steps=3)
    losses: list[list[float]] = []
    for salt, seed in ((1, 19), (2, 19), (3, 20)):
        torch.manual_seed(salt)
        seen: list[float] = []
        run_recall(
            replace(recipe, seed=seed),
            on_metrics=lambda m, s=seen: s.append(m["loss_nats"]),
        )
        losses.append(seen)
    assert losses[0] == losses[1] != losses[2]


def test_a_folder_keeps_model_log_and_record(tmp_path) -> None:
    out = tmp_path / "kept"
    result = run_recall(QUICK, out=out)
    record = json.loads((out / "record.json").read_text())
    assert record["results"] == json.loads(json.dumps(result))
    assert (record["status"], record["seed"]) == ("done", 19)
    assert (out / "metrics.jsonl").is_file()
    model = load_model(out).model
    accuracy = measure_recall(model, AssociativeRecall(num_pairs=6), 40, 19 + 2**32)
    assert accuracy == result["accuracy"]["6"]
    with pytest.raises(InputError, match="already exists"):
        run_recall(QUICK, out=out)


def test_slots() -> None:
    assert build_config(num_slots=8).num_slots == 8
    assert build_config(preset="selective", num_slots=8).num_slots == 8
    for preset in ("core", "unimatrix"):
        with pytest.raises(InputError, match=f"slots is 8 and preset '{preset}' has no slots"):
            build_config(preset=preset, num_slots=8)
    with pytest.raises(InputError, match="num_slots is 0"):
        build_config(num_slots=0)


def test_of_ids_that_are_no_bytes_every_token_is_a_unit() -> None:
    assert build_config(preset="unimatrix").index_units == "tokens"
    recipe = find_recall_recipe("bindings")
    assert UniMatrixConfig.preset("unimatrix", **recipe.overrides).index_units == "words"


def test_overrides() -> None:
    config = build_config(overrides={"write_gate": False, "pointer": False})
    assert not config.write_gate
    assert not config.pointer


def test_our_own_recipe() -> None:
    result = run_recall(SELECTIVE)
    assert (result["task"], list(result["accuracy"])) == ("associative", ["4", "6", "8"])
    assert result["mean_accuracy"] == pytest.approx(sum(result["accuracy"].values()) / 3)
    assert result["state_bytes"] == sum(result["state_bytes_by_part"].values())
    assert result["state_bytes_by_part"]["slots"] == 8 * 7
    assert list(result["copy_rules"]) == ["4", "6", "8"]


def test_our_recipe_learns_in_seconds() -> None:
    """Four slots for four pairs: the gate must keep the bindings and let the filler go."""
    recipe = replace(
        find_recall_recipe("associative", "selective"),
        num_slots=4,
        test_pairs=(4,),
        batch_size=16,
        learning_rate=3e-3,
        test_examples=256,
    )
    before = run_recall(replace(recipe, steps=1, learning_rate=0.0))
    after = run_recall(replace(recipe, steps=40))
    assert before["accuracy"]["4"] < 0.5
    assert after["accuracy"]["4"] > 0.9


def test_the_trained_model_is_tested_with_other_slots() -> None:
    recipe = replace(SELECTIVE, test_slots=(2, 0), test_pairs=(3, 5))
    result = run_recall(recipe)
    assert list(result["accuracy"]) == [
        "3 in 2 slots",
        "3 in 3 slots",
        "5 in 2 slots",
        "5 in 5 slots",
    ]
    # What is kept is the model as it was trained.
    assert result["state_bytes_by_part"]["slots"] == 8 * 7


def test_the_trained_model_is_tested_with_other_numbers_of_tokens_kept() -> None:
    recipe = replace(find_recall_recipe("mqar-b"), **SHORT | {"test_examples": 2})
    seen: list[str] = []
    result = run_recall(replace(recipe, test_kept=(256, 128)), on_test=seen.append)
    assert list(result) == [*FIELDS[:7], "kept", *FIELDS[7:]]
    assert seen[-8:] == ["128 tokens kept", *result["accuracy"]]
    assert [kept["automaton_window"] for kept in result["kept"]] == [256, 128]
    sizes = [result["state_bytes"], *(kept["state_bytes"] for kept in result["kept"])]
    assert sizes == sorted(sizes, reverse=True)
    for kept in result["kept"]:
        assert list(kept["accuracy"]) == list(result["accuracy"])
        assert kept["mean_accuracy"] == pytest.approx(sum(kept["accuracy"].values()) / 7)
        # What is as long as the window is read as before.
        assert kept["accuracy"]["64x4"] == result["accuracy"]["64x4"]


def test_of_mqar_b_16_kib_of_state_are_tested() -> None:
    recipe = find_recall_recipe("mqar-b")
    config = build_recall_config(recipe, build_slices(recipe))
    sizes = []
    for num_tokens in (recipe.test_kept[0], recipe.test_kept[0] + 10):
        config.automaton_window = num_tokens
        sizes.append(sum(measure_state_bytes(UniMatrixForCausalLM(config)).values()))
    assert sizes[0] <= 16 * 1024 < sizes[1]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"test_kept": (128,)}, "preset 'sparsepointer' has no index of the text; leave it out"),
        ({"preset": "unimatrix", "test_kept": (126,)}, "test_kept is 126; pass an even number"),
        ({"num_pairs": 0}, "num_pairs is 0"),
        ({"num_pairs": 9}, "num_pairs is 9"),
        ({"test_pairs": (4, 9)}, "num_pairs is 9"),
        ({"test_examples": 0}, "test_examples is 0"),
        ({"test_slots": (-1,)}, "test_slots holds -1"),
        ({"test_slots": (4,)}, r"\[4\] and the model of .* 'sparsepointer' has no selective slots"),
        ({"task": "triple", "preset": "selective", "test_slots": (0,)}, "this task has none"),
        ({"test_tokens": 129}, "an example has 129 tokens and the position table 128 rows"),
        ({"steps": 0}, "steps is 0"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_written(tmp_path, fields, named) -> None:
    with pytest.raises(InputError, match=named):
        run_recall(replace(QUICK, **fields), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
