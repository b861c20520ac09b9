import json

import pytest

from tests.byte_models import build_byte_model, save_model
from tests.cli.command import assert_refused, run_command
from unimatrix.data import ByteStream, load_corpus
from unimatrix.evaluation.bits_per_byte import measure_bits_per_byte
from unimatrix.evaluation.compressors import xz_bits_per_byte
from unimatrix.recipe import Recipe, override
from unimatrix.run_folder import RECIPE_FILE, write_json

TEXT = b"".join(b"%d bottles of beer on the wall\r\n" % n for n in range(60))


@pytest.fixture
def folder(tmp_path):
    return save_model(tmp_path / "model", build_byte_model("sparsepointer"))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT)
    return path


def measure(data: bytes, **overrides) -> float:
    model = build_byte_model("sparsepointer", **overrides)
    stream = ByteStream.from_bytes(data, name="text")
    return measure_bits_per_byte(model, stream).bits_per_byte


def test_json(folder, text) -> None:
    answer = run_command("eval", folder, "--data", text, "--json")
    held_out = TEXT[len(TEXT) - len(TEXT) // 20 :]
    result = answer.result
    assert result.pop("seconds") > 0
    assert result.pop("state_bytes") > 0
    assert result.pop("prime") is None
    assert result == {
        "bits_per_byte": pytest.approx(measure(held_out), rel=1e-6),
        "xz_bits_per_byte": xz_bits_per_byte(held_out),
        "bytes": len(held_out),
        "split": "valid",
        "split_bytes": len(held_out),
        "context": "carried",
        "corpus": str(text),
        "corpus_sha256": load_corpus(str(text)).sha256,
        "parameters": build_byte_model("sparsepointer").num_parameters(),
        "model": folder,
    }
    assert (answer.exit_code, answer.stderr) == (0, "")


def test_a_prefix_of_a_whole_file(folder, text) -> None:
    options = ("--valid-data", text, "--limit-bytes", 300)
    result = run_command("eval", folder, *options, "--json").result
    assert result["bits_per_byte"] == pytest.approx(measure(TEXT[:300]), rel=1e-6)
    assert result["xz_bits_per_byte"] == xz_bits_per_byte(TEXT[:300])
    assert (result["bytes"], result["split_bytes"]) == (300, len(TEXT))
    shown = run_command("eval", folder, *options).text
    assert f"bits per byte  {result['bits_per_byte']:.4f}" in shown
    assert "the first 300 bytes of" in shown


def test_a_text_read_first(folder, text, tmp_path) -> None:
    first = tmp_path / "first.txt"
    first.write_bytes(TEXT[:200])
    options = ("--valid-data", text, "--prime", first)
    result = run_command("eval", folder, *options, "--json").result
    assert result["context"] == "carried, after 200 bytes"
    assert result["prime"]["bytes"] == 200
    assert "which read nothing before" in run_command("eval", folder, *options).text
    assert result["bytes"] == len(TEXT)
    assert result["bits_per_byte"] != pytest.approx(measure(TEXT), rel=1e-6)
    answer = run_command("eval", folder, "--valid-data", text, "--prime", tmp_path / "none.txt")
    assert_refused(answer, "none.txt")


def test_compressors_and_a_record(folder, text, tmp_path) -> None:
    first, out = tmp_path / "first.txt", tmp_path / "out"
    first.write_bytes(TEXT)
    options = ("--valid-data", text, "--prime", first, "--compressors", "--limit-bytes", 600)
    answer = run_command("eval", folder, *options, "--out", out, "--json")
    scores = answer.result["compressors"]
    assert scores["xz -9e"]["plain"] == xz_bits_per_byte(TEXT[:600])
    assert all(score["primed"] < score["plain"] for score in scores.values())
    record = json.loads((out / "record.json").read_text())
    assert (record["status"], record["results"]) == ("done", answer.result)
    assert "versions" in record
    assert "(primed: " in run_command("eval", folder, *options).text
    refused = run_command("eval", folder, *options, "--out", out)
    assert_refused(refused, "please choose another --out")
    alone = run_command("eval", folder, "--valid-data", text, "--compressors", "--json").result
    assert set(alone["compressors"]["xz -9e"]) == {"plain"}


def test_other_splits(folder, text) -> None:
    result = run_command("eval", folder, "--data", text, "--split", "train", "--json").result
    assert result["bytes"] == len(TEXT) - len(TEXT) // 20
    assert_refused(
        run_command("eval", folder, "--data", text, "--split", "test"), "choose one of train, valid"
    )
    assert_refused(
        run_command("eval", folder, "--data", text, "--split", "tset"), "Did you mean 'test'?"
    )


def test_windows_of_a_position_table(tmp_path, text) -> None:
    model = build_byte_model("sparsepointer", max_position_embeddings=50)
    folder = save_model(tmp_path / "table", model)
    result = run_command("eval", folder, "--valid-data", text, "--json").result
    assert result["context"] == "windows of 50"
    expected = measure(TEXT, max_position_embeddings=50)
    assert result["bits_per_byte"] == pytest.approx(expected, rel=1e-6)


def test_a_run_knows_its_corpus(folder, text, tmp_path) -> None:
    assert_refused(run_command("eval", folder), "name a text with --data")
    recipe = override(Recipe(), [f"data.data={text}"])
    write_json(tmp_path / "model" / RECIPE_FILE, recipe.to_dict())
    given = run_command("eval", folder, "--data", text, "--json").result
    found = run_command("eval", folder, "--json").result
    assert {**found, "seconds": 0} == {**given, "seconds": 0}


def test_unusable_input(folder, text, tmp_path) -> None:
    empty = tmp_path / "empty"
    empty.write_bytes(b"")
    assert_refused(run_command("eval", "core", "--data", text), "'core' is a preset")
    assert_refused(run_command("eval", tmp_path / "no", "--data", text), "there is no run folder")
    assert_refused(run_command("eval", folder, "--data", empty), "is empty")
    assert_refused(run_command("eval", folder, "--data", tmp_path / "no"), "is no file")
    assert_refused(
        run_command("eval", folder, "--data", text, "--limit-bytes", 0), "limit-bytes is 0"
    )
