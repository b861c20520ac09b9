"""Imports point down only, and heavy libraries stay where they belong."""

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "unimatrix"

# Lower layers first: a file imports from its own layer and from those below. The longest beginning
# of its path that stands here says which layer a file belongs to. `hub` meets the rest of Hugging
# Face at every height, so that its files stand in several.
LAYERS = (
    (
        "errors.py",
        "hub/checkpointing.py",
        "hub/packaged.py",
        "hub/saved_loader.py",
        "hub/weights_origin.py",
    ),
    ("ops/",),
    ("configuration", "presets.py"),
    ("nn/",),
    (
        "hub/cache_checks.py",
        "cache.py",
        "loss.py",
        "modeling_documents.py",
        "modeling_inputs.py",
        "modeling_outputs.py",
    ),
    ("kernels/",),
    ("inference/prompt.py", "inference/decoder.py", "inference/loop.py"),
    ("hub/split_head.py", "modeling.py", "pretrained.py"),
    ("tokenization.py", "data/", "tasks/"),
    ("train/field_types.py", "train/recipe.py", "train/run_folder.py", "train/checkpoints.py"),
    ("hub/", "baselines/"),
    ("inference/",),
    ("evaluation/",),
    ("train/",),
    ("bench/", "studies/"),
    ("reports/",),
    ("cli/",),
    ("__init__.py", "__main__.py"),
)
HEIGHT = {beginning: height for height, layer in enumerate(LAYERS) for beginning in layer}
# `data` and `tasks` know no model: they import each other, and from the lowest layer.
BESIDE_THE_MODEL = ("tokenization.py", "data/", "tasks/")
FILES = {path.relative_to(SOURCE).as_posix(): path for path in sorted(SOURCE.rglob("*.py"))}
MODULES = {
    ".".join(("unimatrix", *Path(name).with_suffix("").parts)).removesuffix(".__init__"): name
    for name in FILES
}


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def walk_at_run_time(node: ast.AST) -> Iterator[ast.AST]:
    """Yield what is below a node, without what only type checkers read."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from walk_at_run_time(child)


@functools.cache
def list_imports(path: Path) -> set[str]:
    """Return the full names of what a file imports at run time, inside functions too."""
    names = set()
    for node in walk_at_run_time(parse(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} imports relative to itself"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def list_imported_files(name: str) -> set[str]:
    """Return our own files that one of them imports."""
    ours = {found for found in list_imports(FILES[name]) if found.split(".")[0] == "unimatrix"}
    modules = (found if found in MODULES else found.rpartition(".")[0] for found in ours)
    return {MODULES[module] for module in modules} - {name}


def find_height(name: str) -> int:
    """Return the number of the layer that a file belongs to."""
    beginnings = [beginning for beginning in HEIGHT if name.startswith(beginning)]
    assert beginnings, f"{name} has no layer; give it one"
    return HEIGHT[max(beginnings, key=len)]


@pytest.mark.parametrize("name", FILES)
def test_imports_point_down(name: str) -> None:
    imported = list_imported_files(name)
    if name.startswith("cli/"):
        imported.discard("__init__.py")  # The command tells the package's version.
    if name.startswith(BESIDE_THE_MODEL):
        knows = {other for other in imported if not other.startswith(BESIDE_THE_MODEL)}
        assert knows <= set(LAYERS[0]), f"{name} knows no model, but imports {knows}"
    above = {other for other in imported if find_height(other) > find_height(name)}
    assert not above, f"{name} imports {above}, of a layer above its own"


def test_no_file_imports_itself_by_way_of_others() -> None:
    imports = {name: list_imported_files(name) for name in FILES}
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        pytest.fail(f"import circle: {' > '.join(error.args[1][::-1])}")


@pytest.mark.parametrize("name", FILES)
def test_compilers_are_imported_in_one_place(name: str) -> None:
    roots = {found.partition(".")[0] for found in list_imports(FILES[name])}
    stem = Path(name).stem
    if not (name.startswith(("ops/numba/", "kernels/")) or "native" in stem):
        assert "numba" not in roots
    if "triton" not in stem:
        assert not roots & {"triton", "fla"}
    if name.startswith("ops/"):
        assert "transformers" not in roots


def test_no_silence() -> None:
    """No broad except without a message, no environment variables of ours, no guessed defaults."""
    for path in FILES.values():
        text = path.read_text(encoding="utf-8")
        assert "except:" not in text, path
        assert 'os.environ.get("UNIMATRIX' not in text, path
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr":
                assert len(node.args) < 3 or "config" not in ast.unparse(node.args[0]), path


def test_the_command_line_starts_light() -> None:
    code = (
        "import sys; from unimatrix.cli.main import app;"
        "heavy = {'torch', 'transformers', 'numba', 'datasets'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def is_compiled(node: ast.AST, kinds: set[str]) -> bool:
    """Return whether a function is decorated as one of ``ops/numba/compile.py``'s kinds."""
    return isinstance(node, ast.FunctionDef) and any(
        isinstance(call, ast.Call) and getattr(call.func, "id", "") in kinds
        for call in node.decorator_list
    )


def list_parts(path: Path) -> set[str]:
    """Return the functions of a file that only kernels can call."""
    return {
        node.name
        for node in parse(path).body
        if isinstance(node, ast.FunctionDef) and is_compiled(node, {"part"})
    }


def list_names_python_runs(node: ast.AST) -> set[str]:
    """Return the names that stand anywhere but in compiled functions."""
    names = {node.id} if isinstance(node, ast.Name) else set()
    for child in ast.iter_child_nodes(node):
        if not is_compiled(child, {"kernel", "part"}):
            names |= list_names_python_runs(child)
    return names


def test_python_calls_no_part_of_a_kernel() -> None:
    """A part has nothing that Python could call: the process would end there."""
    parts = {module: list_parts(FILES[name]) for module, name in MODULES.items()}
    assert sum(map(len, parts.values())) > 60
    for path in [*FILES.values(), *Path(__file__).parent.rglob("*.py")]:
        tree, out_of_reach = parse(path), set(list_parts(path))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                taken = {alias.name for alias in node.names} & parts.get(node.module or "", set())
                out_of_reach |= taken
        called = list_names_python_runs(tree) & out_of_reach
        assert not called, f"{path} calls {called}"
