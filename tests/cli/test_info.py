import pytest

from tests.byte_models import build_byte_model, save_model
from tests.cli.command import assert_refused, run_command
from unimatrix.presets import PRESETS

# architecture.md, section 7: 259 ids, 128 positions.
PARAMETERS = {
    "core": 83_140,
    "rosa": 103_876,
    "discovery": 115_184,
    "assoc": 99_588,
    "assoc-hard": 99_588,
    "rosa-assoc": 120_324,
    "rosa-assoc-hard": 120_324,
    "discovery-assoc": 131_632,
    "sparsepointer": 87_494,
    "selective": 108_830,
    "unimatrix": 151_053,
}


def test_all_presets() -> None:
    rows = run_command("info", "--json").result["presets"]
    assert {row["model"]: row["parameters"] for row in rows} == PARAMETERS
    assert set(PARAMETERS) == set(PRESETS)
    for row in rows:
        assert row["parameters"] == sum(row["parameters_by_part"].values())
        assert row["state_bytes"] == sum(row["state_bytes_by_part"].values())
        assert row["state_bytes_by_part"]["matrix_state"] == 3 * 4 * 16 * 16 * 4


def test_the_table_of_presets() -> None:
    answer = run_command("info")
    assert answer.stderr == ""
    head, *lines = answer.text.splitlines()
    assert head.split() == ["preset", "parameters", "state", "bytes", "carries"]
    for line, preset in zip(lines, PRESETS, strict=False):
        assert line.split()[:2] == [preset, f"{PARAMETERS[preset]:,}"]
    by_name = dict(zip(PRESETS, lines, strict=False))
    for part in ("slots", "automaton", "previous token"):
        assert part in by_name["selective"]
    assert "text and index" in by_name["unimatrix"]
    assert "(grows)" not in lines[len(PRESETS) - 1]
    assert "(grows)" in lines[list(PRESETS).index("assoc")]
    assert max(map(len, answer.text.splitlines())) <= 100


@pytest.mark.parametrize("preset", ["core", "discovery", "assoc", "sparsepointer"])
def test_one_preset(preset) -> None:
    result = run_command("info", preset, "--json").result
    assert list(result) == [
        "model",
        "parameters",
        "parameters_by_part",
        "state_bytes",
        "state_bytes_by_part",
        "grows",
        "depth_steps",
        "max_position_embeddings",
        "vocab_size",
        "device",
        "backends",
        "not_compiled",
    ]
    layer_norm = "norm is a layer norm, which torch computes in one pass"
    decoding = {"decode step": "associative_memory is 'dense'"} if preset == "assoc" else {}
    reading = {"norm": layer_norm}
    if preset == "discovery":  # its norm guard needs a scan of its own
        reading["block.step"] = "the scan does not bind its vectors itself"
    assert result["not_compiled"] == {"reading": reading, "decoding": decoding}
    assert result["parameters"] == PARAMETERS[preset]
    assert (result["depth_steps"], result["max_position_embeddings"]) == (3, 128)
    assert result["grows"] == (["dense_memory"] if preset == "assoc" else [])
    assert set(result["backends"]) == {"reading", "decoding"}
    text = run_command("info", preset).text
    assert f"{PARAMETERS[preset]:,}" in text
    assert "at most 128 tokens" in text
    assert ("grows with the text" in text) == (preset == "assoc")


def test_our_own_preset() -> None:
    result = run_command("info", "unimatrix", "--json").result
    assert result["parameters"] == PARAMETERS["unimatrix"]
    assert {"indexed_attention", "pointer_mixture"} < set(result["parameters_by_part"])
    # One index finds places and the longest suffix: there is no automaton beside it.
    assert set(result["state_bytes_by_part"]) == {
        "matrix_state",
        "text and index",
        "previous_token",
        "counters",
    }
    assert result["state_bytes"] < 256 * 1024
    assert (result["grows"], result["max_position_embeddings"]) == ([], None)
    assert result["backends"]["decoding"]["indexed_attention"] == "native"
    text = run_command("info", "unimatrix").text
    for words in ("indexed attention", "pointer mixture", "any"):
        assert words in text


def test_a_window_of_ones_own() -> None:
    own, less = (
        run_command("info", "unimatrix", *options, "--json").result
        for options in ((), ("--window", 4096))
    )
    assert less["state_bytes_by_part"]["text and index"] < 13 * 4096
    assert less["state_bytes"] < own["state_bytes"]
    assert less["parameters"] == own["parameters"]
    assert_refused(run_command("info", "--window", 4096), "no model is named")
    assert_refused(run_command("info", "core", "--window", 4096), "leave the window out")


def test_a_saved_model_of_any_length(tmp_path) -> None:
    model = build_byte_model("core", residual_path="suffix_automaton")
    folder = save_model(tmp_path, model)
    result = run_command("info", folder, "--json").result
    assert result["parameters"] == model.num_parameters()
    assert result["max_position_embeddings"] is None
    assert result["grows"] == ["automaton"]
    assert result["backends"]["reading"]["suffix_automaton"] == "native"
    text = run_command("info", folder).text
    assert "any" in text
    assert str(folder) in text


def test_unusable_names(tmp_path) -> None:
    assert_refused(run_command("info", "sparspointer"), "Did you mean 'sparsepointer'?")
    assert_refused(run_command("info", tmp_path), "has no config.json")
