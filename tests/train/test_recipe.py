import dataclasses
from pathlib import Path

import pytest

from unimatrix.configuration import UniMatrixConfig
from unimatrix.errors import InputError
from unimatrix.modeling import UniMatrixForCausalLM
from unimatrix.train.recipe import (
    DataSection,
    EvalSection,
    ModelSection,
    Recipe,
    TrainSection,
    describe_key,
    find_difference,
    list_keys,
    list_recipes,
    load_recipe,
    make_paths_absolute,
    override,
)

PAPER_PARAMETERS = {"paper-core": 83_140, "paper-rosa": 103_876, "paper-discovery": 115_184}

EVERY_FIELD_CHANGED = Recipe(
    model=ModelSection(preset="rosa", overrides={"dropout": 0.2, "max_position_embeddings": None}),
    data=DataSection(
        data=("a", "b"),
        valid_data=("c",),
        window_tokens=9,
        leading_bos=False,
        carried_automaton=True,
    ),
    train=TrainSection(
        minutes=1.5,
        batch_size=6,
        accumulation_steps=2,
        learning_rate=1e-2,
        schedule="linear",
        warmup_fraction=0.5,
        cooldown_fraction=0.3,
        optimizer="adamw_torch",
        beta1=0.8,
        beta2=0.9,
        weight_decay=0.1,
        decay_embeddings=True,
        decay_all=True,
        max_grad_norm=0.5,
        precision="bfloat16",
        num_threads=3,
        seed=4,
        log_every_steps=3,
        save_every_steps=7,
        keep_checkpoints=5,
    ),
    eval=EvalSection(protocol="windows", prefix_bytes=5, batch_size=2, sample_bytes=0),
)


@pytest.mark.parametrize("name", list_recipes())
def test_every_shipped_recipe_is_whole(name: str) -> None:
    recipe = load_recipe(name)
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert (recipe.train.minutes is None) != (recipe.train.steps is None)
    assert recipe.model.preset is not None
    config = UniMatrixConfig.preset(recipe.model.preset, **recipe.model.overrides)
    rows = config.max_position_embeddings
    assert rows is None or rows >= recipe.data.window_tokens
    num_parameters = UniMatrixForCausalLM(config).num_parameters()
    assert num_parameters == PAPER_PARAMETERS.get(name, num_parameters)
    assert 10_000 < num_parameters < 10_000_000


def test_shipped_recipes_are_known() -> None:
    assert {"default", *PAPER_PARAMETERS} <= set(list_recipes())


def test_recipe_survives_its_dictionary() -> None:
    assert Recipe.from_dict(EVERY_FIELD_CHANGED.to_dict()) == EVERY_FIELD_CHANGED
    default = Recipe()
    for section in dataclasses.fields(Recipe):
        one, other = getattr(EVERY_FIELD_CHANGED, section.name), getattr(default, section.name)
        same = [
            f.name
            for f in dataclasses.fields(one)
            if getattr(one, f.name) == getattr(other, f.name)
        ]
        # Not with what another field says.
        assert set(same) <= {
            "init",
            "steps",
            "compile",
            "prime_bytes",
            "documents",
            "document_share",
            "answer_weight",
            "questions",
        }


def test_every_field_has_help() -> None:
    for key in list_keys():
        assert len(describe_key(key)) > 15, key


@pytest.mark.parametrize(
    ("assignment", "hint"),
    [
        ("train.lr=1", "'train.learning_rate'"),
        ("lr=1", "'train.learning_rate'"),
        ("learning_rate=1", "'train.learning_rate'"),
        ("train.batchsize=1", "'train.batch_size'"),
        ("eval.seed=1", "'train.seed'"),
        ("model.hiden_size=1", "'hidden_size'"),
        ("trian.steps=1", "'train.steps'"),
    ],
)
def test_unknown_key_names_the_nearest(assignment: str, hint: str) -> None:
    with pytest.raises(InputError, match=f"Did you mean {hint}"):
        override(Recipe(), [assignment])


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("train.steps", "write key=value"),
        ("train.steps=many", "whole number"),
        ("train.steps=1.5", "whole number"),
        ("train.steps=0", "at least 1"),
        ("train.steps=true", "whole number"),
        ("train.minutes=0", "greater than 0"),
        ("train.minutes=-1", "greater than 0"),
        ("train.minutes=inf", "greater than 0"),
        ("train.minutes=nan", "greater than 0"),
        ("train.learning_rate=fast", "must be a number"),
        ("train.learning_rate=nan", "at least 0"),
        ("train.beta1=2", "from 0 to 1"),
        ("train.decay_all=1", "true or false"),
        ("train.schedule=cosin", "Did you mean 'cosine'"),
        ("train.precision=fp8", "float32, bfloat16"),
        ("train.seed=-1", "from 0 to"),
        ("eval.protocol=window", "Did you mean 'windows'"),
        ("data.data=3", "list of texts"),
        ("data.data=[]", "is empty"),
        ("data.document_share=2", "from 0 to 1"),
        ("data.answer_weight=3", "data.document_share is 0; plain text has no answers"),
        ("eval.questions=3", "0, or at least 8"),
        ("model.hidden_size=big", "whole number"),
        ("model.overrides=3", "table"),
        ("model.preset=none", "exactly one"),
    ],
)
def test_unusable_value_is_one_sentence(assignment: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        override(Recipe(), [assignment])
    assert "\n" not in str(caught.value)


def test_override_reads_values() -> None:
    recipe = override(
        EVERY_FIELD_CHANGED,
        [
            "train.learning_rate = 3e-4",
            "train.decay_all=false",
            "train.save_every_steps=none",
            'data.valid_data=["x", "y"]',
            "model.hidden_size=32",
            "model.max_position_embeddings=none",
            "model.residual_path=none",
        ],
    )
    assert recipe.train.learning_rate == 3e-4
    assert recipe.train.decay_all is False
    assert recipe.train.save_every_steps is None
    assert recipe.data.valid_data == ("x", "y")
    assert recipe.model.overrides == {
        "dropout": 0.2,
        "max_position_embeddings": None,
        "hidden_size": 32,
        "residual_path": "none",
    }


def test_minutes_and_steps_replace_each_other() -> None:
    recipe = override(EVERY_FIELD_CHANGED, ["train.steps=20"])
    assert (recipe.train.minutes, recipe.train.steps) == (None, 20)
    recipe = override(recipe, ["train.minutes=2"])
    assert (recipe.train.minutes, recipe.train.steps) == (2.0, None)
    with pytest.raises(InputError, match="give one of them"):
        override(recipe, ["train.minutes=2", "train.steps=3"])


def test_new_preset_leaves_the_old_overrides() -> None:
    recipe = override(EVERY_FIELD_CHANGED, ["model.preset=core", "model.num_slots=4"])
    assert recipe.model.preset == "core"
    assert recipe.model.overrides == {"max_position_embeddings": None, "num_slots": 4}


def test_init_replaces_the_model() -> None:
    recipe = override(EVERY_FIELD_CHANGED, ["model.init=folder"])
    assert recipe.model == ModelSection(preset=None, init="folder")
    with pytest.raises(InputError, match=r"model\.dropout cannot be set beside model\.init"):
        override(recipe, ["model.dropout=0.0"])
    with pytest.raises(InputError, match="exactly one"):
        override(recipe, ["model.init=folder", "model.preset=core"])


def test_new_data_leaves_the_old_validation() -> None:
    assert override(EVERY_FIELD_CHANGED, ["data.data=x"]).data.valid_data == ()
    changed = override(EVERY_FIELD_CHANGED, ["data.data=x", "data.valid_data=y"])
    assert (changed.data.data, changed.data.valid_data) == (("x",), ("y",))


def test_find_difference_names_the_field() -> None:
    assert find_difference(Recipe(), Recipe()) is None
    assert find_difference(Recipe(), override(Recipe(), ["train.seed=5"])) == "train.seed"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[train\nsteps = 3", "is no TOML"),
        ("[trian]\nsteps = 3", "Did you mean 'train'"),
        ("train = 3", r"must be a section, \[train\]"),
        ("[train]\nstep = 3", "Did you mean 'train.steps'"),
        ('[train]\nsteps = "3"', "whole number"),
        ("[train]\nsteps = 3\nminutes = 1", "give one of them"),
        ("[model.overrides]\nhead_dims = 3", "Did you mean 'head_dim'"),
    ],
)
def test_ill_formed_recipe_file_is_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        load_recipe(path)
    assert "\n" not in str(caught.value)


def test_recipe_is_read_from_json_too(tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    path.write_text('{"train": {"steps": 5}}')
    assert load_recipe(path).train.steps == 5
    path.write_text('{"train"')
    with pytest.raises(InputError, match="is no JSON"):
        load_recipe(path)
    path.write_text("[1]")
    with pytest.raises(InputError, match="object of sections"):
        load_recipe(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="no UTF-8"):
        load_recipe(path)


def test_missing_recipe_names_the_nearest() -> None:
    with pytest.raises(InputError, match="Did you mean 'paper-rosa'"):
        load_recipe("paper-roza")


def test_paths_are_made_absolute_and_corpora_keep_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    typed = override(Recipe(), ["model.init=runs/one", 'data.data=["a.txt", "~/b/*"]'])
    stored = make_paths_absolute(typed)
    assert stored.model.init == str(tmp_path / "runs" / "one")
    assert stored.data.data == (str(tmp_path / "a.txt"), "/home/someone/b/*")
    assert make_paths_absolute(stored) == stored
    assert make_paths_absolute(Recipe()) == Recipe()


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"leading_bos": False}, "data.leading_bos is false and data.documents is 'packed'"),
        ({"carried_automaton": True}, "data.carried_automaton is True and data.documents is"),
        ({"document_share": 0.5}, "data.document_share is 0.5 and data.documents is 'packed'"),
    ],
)
def test_packed_documents_read_nothing_before_them(others: dict[str, object], message: str) -> None:
    assert Recipe().data.documents == "joined"
    assert override(Recipe(), ["data.documents=packed"]).data.documents == "packed"
    with pytest.raises(InputError, match=message):
        DataSection(documents="packed", **others)
    with pytest.raises(InputError, match=r"data.documents is 'pack'.*Did you mean 'packed'"):
        DataSection(documents="pack")
