"""Documents say what is so: commands, equations, deviations, links."""

import re
import shlex
from pathlib import Path

import pytest
import typer.main

from unimatrix.cli.main import app

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "results/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
COMMANDS = typer.main.get_command(app).commands

# The options of every verb. A new one is a decision: change this list with it.
OPTIONS = {
    "ask": "device file help json model question window",
    "bench": "batch-size budget compile data device equal-parameters help json length mode out "
    "peer precision preset quick rounds seed set threads",
    "compare": "data device help json only out quick report",
    "eval": "compressors data device help json limit-bytes out prime seed split valid-data window",
    "eval-long": "data device examples help json length out quick report seed task",
    "generate": "device help json max-new-bytes prime prompt-file seed temperature top-k top-p "
    "window",
    "info": "device help json seed window",
    "recall": "batch-size data device dropout help json lr out pairs preset quick report seed set "
    "slots steps test-data test-examples test-pairs test-slots test-tokens test-window "
    "weight-decay",
    "reproduce": "check data device help json only out quick valid-data",
    "train": "data device dry-run help init json minutes out preset resume seed set steps "
    "valid-data",
}


def read_commands() -> list[str]:
    """Return every `unimatrix ...` command that a document shows."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in DOCUMENTS)
    found = re.findall(r"^unimatrix [^#\n]+", text, re.MULTILINE)
    found += re.findall(r"`(unimatrix [^`]+)`", text)
    return sorted({command.strip() for command in found})


@pytest.mark.parametrize("command", read_commands())
def test_commands_in_documents_parse(command: str) -> None:
    verb, *arguments = shlex.split(command)[1:]
    if verb.startswith("-"):
        return
    assert verb in COMMANDS, command
    context = COMMANDS[verb].make_context(verb, list(arguments), resilient_parsing=True)
    known = {flag for parameter in COMMANDS[verb].params for flag in parameter.opts}
    for argument in arguments:
        if argument.startswith("--"):
            assert argument.partition("=")[0] in known, f"{command}: {argument}"
    context.close()


@pytest.mark.parametrize("verb", sorted(OPTIONS))
def test_options_do_not_multiply(verb: str) -> None:
    flags = {
        flag.removeprefix("--")
        for parameter in COMMANDS[verb].params
        for flag in parameter.opts
        if flag.startswith("--")
    }
    assert flags | {"help"} == set(OPTIONS[verb].split())


def test_every_verb_has_its_options_listed() -> None:
    assert set(COMMANDS) == set(OPTIONS)


def list_equations(text: str) -> set[int]:
    """Return the numbers of the equations that a text names, those inside "E1 to E4" too."""
    ranges = re.findall(r"\bE(\d+)\b(?: to E(\d+)\b)?", text)
    return {n for first, last in ranges for n in range(int(first), int(last or first) + 1)}


def test_document_and_code_name_the_same_equations() -> None:
    texts = {path: path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py")}
    in_code = set().union(*map(list_equations, texts.values()))
    document = (ROOT / "docs/equations.md").read_text(encoding="utf-8")
    defined = {int(number) for number in re.findall(r"\*\*E(\d+)\b", document)}
    assert defined == set(range(1, len(defined) + 1))
    assert in_code == defined
    references = ("reference.py", "read.py", "decisions.py", "slot_mixer.py")
    spelt = [list_equations(text) for path, text in texts.items() if path.name in references]
    assert set(range(1, 11)) <= set().union(*spelt)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_documents_name_files_that_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for path in re.findall(r"`([\w<>/-]+(?:/|\.py))(?:::\w+)?`", text):
        pattern = re.sub(r"<operator>|OPERATOR|NAME", "*", path).rstrip("/")
        places = (ROOT, ROOT / "src/unimatrix", document.parent)
        places = places if "/" in path else (ROOT / "src", ROOT / "tests")
        search = pattern if "/" in path else f"**/{pattern}"
        assert any(next(place.glob(search), None) for place in places), path


def test_every_deviation_names_a_test_that_exists() -> None:
    text = (ROOT / "docs/deviations.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \*\*D(\d)\*\*.*$", text, re.MULTILINE)
    assert rows == [str(number) for number in range(1, 8)]
    for path, name in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text):
        content = (ROOT / path).read_text(encoding="utf-8")
        assert not name or f"def {name}(" in content, f"{path}::{name}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (path.parent / target).exists(), target


def test_readme_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(block, names)
    assert (tmp_path / "stream.safetensors").is_file()
