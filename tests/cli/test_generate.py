import base64
import os
import subprocess
import sys

import pytest

from tests.byte_models import build_byte_model, prefer, save_model
from tests.cli.command import assert_refused, run_command
from tests.models import build_model
from unimatrix.inference.generation import generate_bytes
from unimatrix.inference.sampling import Sampling
from unimatrix.tokenization import EOS_ID

ANY_BYTES = bytes(range(256))
GREEDY = ("--temperature", 0, "--max-new-bytes", 24)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("free"), build_byte_model("sparsepointer", seed=3))


@pytest.fixture(scope="module")
def table_folder(tmp_path_factory):
    model = build_byte_model(max_position_embeddings=40)
    return save_model(tmp_path_factory.mktemp("table"), model)


def continue_prompt(prompt: bytes) -> bytes:
    model = build_byte_model("sparsepointer", seed=3)
    return generate_bytes(model, prompt, max_new_bytes=24, sampling=Sampling(temperature=0)).data


def test_a_pipe_gets_the_exact_new_bytes(folder) -> None:
    answer = run_command("generate", folder, "héllo", *GREEDY)
    assert answer.exit_code == 0
    assert answer.stdout == continue_prompt("héllo".encode())
    assert answer.stderr.startswith("24 bytes in ")
    assert "stopped by the limit" in answer.stderr


@pytest.mark.parametrize("prompt", [b"", ANY_BYTES, b"\r\n\x00\xff", "日".encode()[:2]])
def test_any_bytes_from_a_file_or_stdin(folder, tmp_path, prompt) -> None:
    expected = continue_prompt(prompt)
    path = tmp_path / "prompt"
    path.write_bytes(prompt)
    assert run_command("generate", folder, "--prompt-file", path, *GREEDY).stdout == expected
    assert run_command("generate", folder, *GREEDY, stdin=prompt).stdout == expected
    assert run_command("generate", folder, "-", *GREEDY, stdin=prompt).stdout == expected


def test_a_text_is_read_first(folder, tmp_path) -> None:
    path = tmp_path / "first"
    path.write_bytes(ANY_BYTES)
    answer = run_command("generate", folder, "ab", *GREEDY, "--prime", path)
    assert answer.stdout == continue_prompt(ANY_BYTES + b"ab")
    assert answer.stderr.startswith("reading 256 bytes first")


def test_what_cannot_be_read_first(folder, table_folder, tmp_path) -> None:
    (tmp_path / "empty").touch()
    answer = run_command("generate", folder, "ab", "--prime", tmp_path / "empty")
    assert_refused(answer, "empty")
    (tmp_path / "text").write_text("abc")
    answer = run_command("generate", table_folder, "ab", "--prime", tmp_path / "text")
    assert_refused(answer, "reads windows and nothing before them")


def test_any_bytes_from_the_command_line(folder) -> None:
    prompt = bytes(range(1, 256))
    answer = run_command("generate", folder, *GREEDY, "--", os.fsdecode(prompt), stdin=b"not this")
    assert answer.stdout == continue_prompt(prompt)


def test_json(folder) -> None:
    result = run_command("generate", folder, "ab", *GREEDY, "--seed", 5, "--json").result
    expected = continue_prompt(b"ab")
    assert result["text"] == expected.decode("utf-8", "replace")
    assert base64.b64decode(result["base64"]) == expected
    assert (result["bytes"], result["stopped"], result["seed"]) == (24, "length", 5)
    assert result["bytes_per_s"] == pytest.approx(24 / result["seconds"], rel=0.01, abs=0.1)
    assert list(result) == [
        "text",
        "base64",
        "bytes",
        "seconds",
        "bytes_per_s",
        "stopped",
        "seed",
    ]


def test_a_seed_repeats_a_text(folder) -> None:
    first = run_command("generate", folder, "ab", "--max-new-bytes", 30, "--json").result
    seed = first["seed"]
    again = run_command("generate", folder, "ab", "--max-new-bytes", 30, "--seed", seed).stdout
    assert again == base64.b64decode(first["base64"])


def test_the_models_end_of_text(tmp_path) -> None:
    folder = save_model(tmp_path, prefer(build_byte_model(), EOS_ID))
    result = run_command("generate", folder, "ab", "--json").result
    assert (result["text"], result["bytes"], result["stopped"]) == ("", 0, "eos")


def test_a_terminal_shows_prompt_and_text(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    folder = save_model(tmp_path, prefer(build_byte_model(), 0x1B))
    options = ("--max-new-bytes", 3, "--temperature", 0)
    answer = run_command("generate", folder, "\x1b[31mab", *options, terminal=True)
    assert answer.text == "\x1b[2m␛[31mab\x1b[0m␛␛␛\n"
    long = tmp_path / "long"
    long.write_bytes("é".encode() * 1000 + b"a\n")
    answer = run_command("generate", folder, "--prompt-file", long, *options, terminal=True)
    assert answer.text == "\x1b[2m… " + "é" * 199 + "a\x1b[0m\n␛␛␛\n"
    assert run_command("generate", folder, *options, terminal=True).text == "␛␛␛\n"


def test_the_position_table_bounds_the_length(table_folder) -> None:
    run = ("generate", table_folder, "0123456789")
    assert run_command(*run, "--temperature", 0, "--json").result["bytes"] == 30
    assert run_command(*run, "--max-new-bytes", 30, "--json").exit_code == 0
    assert_refused(run_command(*run, "--max-new-bytes", 31), "max-new-bytes is 31", "at most 30")
    assert_refused(
        run_command("generate", table_folder, "x" * 40), "40 bytes", "a prompt of at most 39"
    )


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--temperature", -1), "temperature is -1.0"),
        (("--temperature", "nan"), "temperature is nan"),
        (("--top-p", 0), "top_p is 0.0"),
        (("--top-p", 1.5), "top_p is 1.5"),
        (("--top-k", 0), "top_k is 0"),
        (("--max-new-bytes", 0), "max-new-bytes is 0"),
        (("--device", "gpu"), "unknown device 'gpu'"),
        (("--window", 512), "neither an index of the text nor a suffix automaton"),
        (("--prompt-file", "x"), "a PROMPT and a --prompt-file"),
    ],
)
def test_unusable_options(folder, options, sentence) -> None:
    assert_refused(run_command("generate", folder, "ab", *options), sentence)


def test_unusable_models_and_files(folder, tmp_path) -> None:
    assert_refused(run_command("generate", "core", "ab"), "'core' is a preset")
    assert_refused(run_command("generate", tmp_path / "no", "ab"), "there is no run folder")
    assert_refused(
        run_command("generate", folder, "--prompt-file", tmp_path / "no"), "no such file"
    )
    assert_refused(
        run_command("generate", folder, "--prompt-file", tmp_path), "cannot read --prompt-file"
    )
    recall = save_model(tmp_path / "recall", build_model("core").float())
    assert_refused(run_command("generate", recall, "ab"), "vocabulary of 23 ids")


@pytest.mark.slow
def test_bytes_stream_through_a_real_pipe(folder) -> None:
    command = [sys.executable, "-m", "unimatrix", "generate", folder, "--temperature", "0"]
    done = subprocess.run(
        [*command, "--max-new-bytes", "24"], input=ANY_BYTES, capture_output=True, check=True
    )
    assert done.stdout == continue_prompt(ANY_BYTES)
    with subprocess.Popen(
        [*command, "--max-new-bytes", "100000", "ab"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        # The first bytes are here long before the last; then the reader leaves.
        assert process.stdout.read(10) == continue_prompt(b"ab")[:10]
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()
        assert process.wait() == 1
