import json
from dataclasses import replace

import pytest

from tests.byte_models import build_byte_model, save_model
from tests.cli.command import assert_refused, run_command
from unimatrix.data import ByteStream, load_corpus
from unimatrix.evaluation.bits_per_byte import measure_bits_per_byte
from unimatrix.evaluation.compressors import xz_bits_per_byte
from unimatrix.train.recipe import Recipe
from unimatrix.train.run_folder import RECIPE_FILE, write_json, write_record

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


def test_a_file_that_is_named_is_measured_whole(folder, text) -> None:
    answer = run_command("eval", folder, "--data", text, "--json")
    result = answer.result
    assert result.pop("seconds") > 0
    assert result.pop("state_bytes") > 0
    assert result.pop("prime") is None
    assert result == {
        "bits_per_byte": pytest.approx(measure(TEXT), rel=1e-6),
        "xz_bits_per_byte": xz_bits_per_byte(TEXT),
        "bytes": len(TEXT),
        "text": str(text),
        "split": "all",
        "split_bytes": len(TEXT),
        "context": "carried",
        "corpus": str(text),
        "corpus_sha256": load_corpus(str(text), str(text)).sha256,
        "parameters": build_byte_model("sparsepointer").num_parameters(),
        "model": folder,
        "window": build_byte_model("sparsepointer").config.automaton_window,
    }
    assert (answer.exit_code, answer.stderr) == (0, "")
    assert f"all 1,910 bytes of {text}\n" in run_command("eval", folder, "--data", text).text


def test_a_window_of_ones_own(tmp_path, text) -> None:
    """The same weights remember less, at fewer bytes of state."""
    model = build_byte_model("unimatrix")
    folder = save_model(tmp_path / "indexed", model)
    own, less = (
        run_command("eval", folder, "--data", text, *options, "--json").result
        for options in ((), ("--window", 128))
    )
    model.set_window(128)
    expected = measure_bits_per_byte(model, ByteStream.from_bytes(TEXT, name="text"))
    assert (less["window"], less["state_bytes"]) == (128, expected.state_bytes)
    assert less["bits_per_byte"] == pytest.approx(expected.bits_per_byte, rel=1e-6)
    assert less["state_bytes"] < own["state_bytes"]
    assert_refused(run_command("eval", folder, "--data", text, "--window", 129), "window is 129")


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


@pytest.fixture
def make_run(folder, tmp_path):
    """Return a function that makes the model a run that was trained on some text."""

    def make(data, valid_data=(), *, has_record=True):
        section = replace(Recipe().data, data=tuple(data), valid_data=tuple(valid_data))
        write_json(tmp_path / "model" / RECIPE_FILE, replace(Recipe(), data=section).to_dict())
        if has_record:
            corpus = {"sha256": load_corpus(data, list(valid_data) or None).sha256}
            write_record(tmp_path / "model", {"status": "done", "corpus": corpus})

    return make


@pytest.mark.parametrize("has_record", [True, False])
def test_of_what_a_run_was_trained_on_the_held_out_end_is_measured(
    folder, text, make_run, tmp_path, has_record
) -> None:
    assert_refused(run_command("eval", folder), "name a text with --data")
    make_run([str(text)], has_record=has_record)
    found = run_command("eval", folder, "--json").result
    given = run_command("eval", folder, "--data", text, "--json")
    assert {**found, "seconds": 0} == {**given.result, "seconds": 0}
    assert (found["bytes"], found["split"]) == (len(TEXT) // 20, "valid")
    assert found["bits_per_byte"] == pytest.approx(measure(TEXT[-(len(TEXT) // 20) :]), rel=1e-6)
    assert given.stderr == (
        f"{text} is what the run was trained on: measuring the last 95 bytes, which it was not\n"
    )
    assert f"all 95 bytes of {text} (valid)\n" in run_command("eval", folder).text

    whole = run_command("eval", folder, "--valid-data", text, "--json")
    assert (whole.result["bytes"], whole.result["text"]) == (len(TEXT), str(text))
    assert f"{text}: measured, and trained on by the run" in whole.stderr

    other = tmp_path / "other.txt"
    other.write_bytes(TEXT[:500])
    answer = run_command("eval", folder, "--data", other, "--json")
    assert (answer.result["bytes"], answer.stderr) == (500, "")
    both = run_command("eval", folder, "--data", text, "--data", other, "--json")
    assert both.result["bytes"] == len(TEXT) + 500
    assert f"{text}: measured, and trained on by the run" in both.stderr


def test_a_copy_of_what_a_run_was_trained_on_is_the_same(folder, text, make_run, tmp_path) -> None:
    make_run([str(text)])
    text.rename(tmp_path / "moved.txt")
    result = run_command("eval", folder, "--data", tmp_path / "moved.txt", "--json").result
    assert result["bytes"] == len(TEXT) // 20


def test_text_that_has_changed_since_is_said(folder, text, make_run) -> None:
    make_run([str(text)])
    text.write_bytes(TEXT + b"more")
    assert "has changed since the run was trained on it" in run_command("eval", folder).stderr
    named = run_command("eval", folder, "--data", text, "--json")
    assert named.result["bytes"] == len(TEXT) + 4
    assert "measured, and trained on by the run" in named.stderr


def test_with_validation_text_of_its_own_a_run_has_no_held_out_end(
    folder, text, make_run, tmp_path
) -> None:
    valid = tmp_path / "valid.txt"
    valid.write_bytes(TEXT[:300])
    make_run([str(text)], [str(valid)])
    answer = run_command("eval", folder, "--data", text, "--json")
    assert answer.result["bytes"] == len(TEXT)
    assert "measured, and trained on by the run" in answer.stderr
    shown = run_command("eval", folder).text
    assert f"all 300 bytes of {valid}\n" in shown


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
