import json
import subprocess
import sys
from typing import Any

import pytest

import unimatrix
from unimatrix.cli import main
from unimatrix.cli.common import emit, pick_device
from unimatrix.errors import InputError

VERBS = ("train", "generate", "eval", "eval-long", "info", "recall", "bench")


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run the command line in this process and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["unimatrix", *arguments])
    with pytest.raises(SystemExit) as caught:
        main.main()
    return 0 if caught.value.code is None else int(caught.value.code)


def test_help_loads_neither_torch_nor_transformers() -> None:
    program = (
        "import sys\n"
        "from unimatrix.cli.main import app\n"
        f"for verb in [None, *{VERBS!r}]:\n"
        "    try:\n"
        "        app([*([verb] if verb else []), '--help'])\n"
        "    except SystemExit as end:\n"
        "        assert end.code == 0, (verb, end.code)\n"
        "loaded = {'torch', 'transformers', 'numba', 'datasets'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    for verb in VERBS:
        assert verb in done.stdout


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"unimatrix {unimatrix.__version__}\n"


@pytest.mark.parametrize(
    "arguments", [("trian",), ("train", "--no-such-option"), ("train", "--steps", "many")]
)
def test_usage_error_exits_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    assert run_main(monkeypatch, *arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err


def fail_with(error: Exception) -> Any:
    def run() -> None:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (InputError("x is [bold]3[/]; give 4"), 2, "error: x is [bold]3[/]; give 4\n"),
        (
            OSError("disk full"),
            1,
            "error: OSError: disk full (`unimatrix --traceback ...` shows where it arose)\n",
        ),
    ],
)
def test_error_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    code: int,
    sentence: str,
) -> None:
    monkeypatch.setattr(main, "app", fail_with(error))
    assert run_main(monkeypatch, "info") == code
    assert capsys.readouterr() == ("", sentence)
    monkeypatch.setattr(sys, "argv", ["unimatrix", "--traceback", "info"])
    with pytest.raises(type(error)):
        main.main()


def test_interrupt_exits_1() -> None:
    program = (
        "from unimatrix.cli import main\n"
        "def run(): raise KeyboardInterrupt\n"
        "main.app.command('stop')(run)\n"
        "import sys; sys.argv = ['unimatrix', 'stop']\n"
        "main.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr


def test_pick_device() -> None:
    assert pick_device("cpu") == "cpu"
    assert pick_device("auto") in ("cpu", "cuda", "mps")
    with pytest.raises(InputError, match=r"Did you mean 'cuda'\?"):
        pick_device("cuda1")


def test_pick_device_refuses_what_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="there is no cuda device here"):
        pick_device("cuda")


def test_emit(capsys: pytest.CaptureFixture[str]) -> None:
    emit({"a": "é"}, True, str)
    assert json.loads(capsys.readouterr().out) == {"a": "é"}
    emit({"a": 1}, False, lambda result: f"a is {result['a']}")
    assert capsys.readouterr().out == "a is 1\n"
