import gzip
from pathlib import Path

import pytest

from tests.byte_models import build_byte_model, save_model
from tests.cli.command import assert_refused, run_command
from tests.inference.test_text_reader import INDEXED, TEXT
from unimatrix.hub import packaged
from unimatrix.inference.text_reader import TextReader

QUESTION = "which number belongs to harkov?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("index"), build_reader_model())


def build_reader_model():
    return build_byte_model("unimatrix", seed=1, **INDEXED)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT)
    return path


def answer_directly(question: str, text: bytes = TEXT):
    reader = TextReader(build_reader_model())
    reader.read(text)
    return reader.ask(question)


def test_json(folder, text) -> None:
    result = run_command(
        "ask", QUESTION, "--file", text, "--model", folder, "--json", "--device", "cpu"
    ).result
    expected = answer_directly(QUESTION)
    assert list(result) == [
        "question",
        "answer",
        "passage",
        "bytes_back",
        "bytes_read",
        "state_bytes",
        "read_seconds",
        "seconds",
    ]
    assert result["question"] == QUESTION
    assert result["answer"] == expected.text
    assert result["passage"] == expected.passage.decode()
    assert result["bytes_back"] == expected.bytes_back
    assert result["bytes_read"] == len(TEXT)
    assert result["state_bytes"] > 1000


def test_files_and_a_pipe_are_one_text(folder, tmp_path) -> None:
    first, last = tmp_path / "first", tmp_path / "last.gz"
    first.write_bytes(TEXT[:50])
    last.write_bytes(gzip.compress(TEXT[50:]))
    ask = ("ask", QUESTION, "--model", folder, "--json")
    read = run_command(*ask, "--file", first, "--file", last).result
    piped = run_command(*ask, stdin=TEXT).result
    # Of a pipe nobody knows the length.
    assert read["state_bytes"] < 12_000 < 10**7 < piped["state_bytes"]
    seconds = ("seconds", "read_seconds", "state_bytes")
    assert {k: v for k, v in read.items() if k not in seconds} == {
        k: v for k, v in piped.items() if k not in seconds
    }


def test_an_answer_and_its_passage(folder, text) -> None:
    answer = run_command("ask", QUESTION, "--file", text, "--model", folder)
    assert answer.exit_code == 0
    expected = answer_directly(QUESTION)
    lines = answer.text.splitlines()
    assert len(lines) == 3
    assert "".join(expected.passage.decode().split()) in "".join(lines[1].split())
    assert f"{expected.bytes_back:,} before the end" in lines[2]
    assert answer.stderr.startswith(f"read {len(TEXT)} bytes in ")


def test_several_questions_after_one_reading(folder, text) -> None:
    ask = ("ask", QUESTION, "--question", "mill?", "--file", text, "--model", folder)
    shown = run_command(*ask).text
    blocks = shown.split("\n\n")
    assert [block.splitlines()[0] for block in blocks] == [QUESTION, "mill?"]
    lines = run_command(*ask, "--json").text.splitlines()
    assert len(lines) == 2
    assert answer_directly("mill?").passage.decode()[:20] in blocks[1]


def test_what_is_forgotten_is_said(folder, tmp_path) -> None:
    path = tmp_path / "long"
    path.write_bytes(TEXT * 3)
    ask = ("ask", QUESTION, "--file", path, "--model", folder)
    assert "remembers" not in run_command(*ask).stderr
    answer = run_command(*ask, "--window", 256)
    assert "remembers the last 256 bytes" in answer.stderr
    assert_refused(run_command(*ask, "--window", 255), "window is 255", "even number of 128")


def test_the_packaged_model_is_the_default(text, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(packaged, "FOLDER", tmp_path)
    ask = ("ask", QUESTION, "--file", text, "--json")
    assert_refused(
        run_command(*ask), "weights of 'unimatrix-reader' are missing", "unimatrix train reader"
    )
    save_model(tmp_path / "reader", build_reader_model())
    assert run_command(*ask).result["answer"] == answer_directly(QUESTION).text


def test_the_answers_that_the_readme_and_the_page_show() -> None:
    text = Path(__file__).parents[2] / "examples" / "harbour.txt"
    for question, answer in (
        ("which number belongs to harkov?", "5202798"),
        ("what is the code of mill lane?", "RT-7714"),
        ("what is the password of dorrit?", "not in the text"),
    ):
        assert run_command("ask", question, "--file", text, "--json").result["answer"] == answer


def test_texts_that_cannot_be_read(folder, tmp_path) -> None:
    ask = ("ask", QUESTION, "--model", folder)
    (tmp_path / "empty").touch()
    assert_refused(run_command(*ask, "--file", tmp_path / "no"), "there is no file", "no'")
    assert_refused(run_command(*ask, "--file", tmp_path / "empty"), "empty' is empty")
    assert_refused(run_command(*ask, "--file", tmp_path), "is no regular file")
    assert_refused(run_command(*ask), "stdin has no bytes")
    assert_refused(run_command(*ask, terminal=True), "there is no text to read; give --file FILE")


def test_questions_and_models_that_cannot_be_used(folder, text, tmp_path) -> None:
    assert_refused(run_command("ask", "--file", text), "there is no question")
    assert_refused(run_command("ask", " ", "--file", text), "the question is ' '; ask in words")
    ask = ("ask", QUESTION, "--file", text, "--model")
    assert_refused(run_command(*ask, "core"), "'core' is a preset")
    assert_refused(run_command(*ask, tmp_path / "no"), "there is no run folder")
    plain = save_model(tmp_path / "plain", build_byte_model("core"))
    assert_refused(run_command(*ask, plain), "keeps no index of the text", "unimatrix train reader")
