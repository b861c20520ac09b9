"""Imports point down only, and heavy libraries stay where they belong."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "unimatrix"

# Lower layers first; a module may import from its own layer and from those before it. `data` and
# `tasks` stand beside the model: they and the model's layers never import each other.
LAYERS = (
    ("allocator", "errors", "processes", "saved_loader"),
    ("ops",),
    ("configuration", "nn"),
    (
        "weights_origin",
        "cache",
        "cache_checks",
        "decoding",
        "loss",
        "modeling_inputs",
        "modeling_outputs",
        "pretrained",
        "split_head",
        "modeling",
        "published",
    ),
    ("tokenization",),
    ("data", "tasks"),
    ("auto", "baselines", "stream_matches"),
    ("field_types", "recipe", "recall_recipe", "run_folder", "run_checkpoints", "checkpoints"),
    ("sampling", "generation", "evaluation"),
    (
        "muon",
        "training_callbacks",
        "training",
        "training_run",
        "recall_slices",
        "recall_run",
        "long_context_run",
    ),
    ("bench", "compare", "reports", "reproduce"),
    ("cli",),
    ("__init__", "__main__"),
)
LAYER = {name: level for level, names in enumerate(LAYERS) for name in names}
FILES = sorted(SOURCE.rglob("*.py"))


def name_area(path: Path) -> str:
    """Return the top-level module or package that a file belongs to."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def list_imports(path: Path) -> set[str]:
    """Return the full names of what a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_imports_point_down(path: Path) -> None:
    area = name_area(path)
    assert area in LAYER, f"{area} has no layer; give it one"
    for name in list_imports(path):
        if not name.startswith("unimatrix."):
            continue
        target = name.split(".")[1]
        if target not in LAYER:
            target = "__init__"  # a name of the package itself, such as __version__
            assert area == "cli", f"{path} imports {name}"
            continue
        assert LAYER[target] <= LAYER[area], f"{area} imports {name}"
        beside = {"data", "tasks", "tokenization"}
        if area in beside:
            lower = {"errors", "saved_loader"}
            assert target in beside | lower, f"{area} knows no model, but imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_compilers_are_imported_in_one_place(path: Path) -> None:
    roots = {name.partition(".")[0] for name in list_imports(path)}
    if path.name != "native.py" and "native" not in path.stem:
        assert "numba" not in roots
    if "triton" not in path.stem:
        assert not roots & {"triton", "fla"}
    if name_area(path) == "ops":
        assert "transformers" not in roots


def test_no_silence() -> None:
    """No broad except without a message, no environment variables of ours, no guessed defaults."""
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert "except:" not in text, path
        assert 'os.environ.get("UNIMATRIX' not in text, path
        for node in ast.walk(ast.parse(text)):
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
    """Return whether a function is decorated as one of ``ops/compile_native.py``'s kinds."""
    return isinstance(node, ast.FunctionDef) and any(
        isinstance(call, ast.Call) and getattr(call.func, "id", "") in kinds
        for call in node.decorator_list
    )


def list_parts(path: Path) -> set[str]:
    """Return the functions of a file that only kernels can call."""
    return {
        node.name
        for node in ast.parse(path.read_text(encoding="utf-8")).body
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
    parts = {
        "unimatrix." + ".".join(path.relative_to(SOURCE).with_suffix("").parts): list_parts(path)
        for path in FILES
    }
    assert sum(map(len, parts.values())) > 60
    for path in [*FILES, *Path(__file__).parent.rglob("*.py")]:
        tree, out_of_reach = ast.parse(path.read_text(encoding="utf-8")), set(list_parts(path))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                taken = {alias.name for alias in node.names} & parts.get(node.module or "", set())
                out_of_reach |= taken
        called = list_names_python_runs(tree) & out_of_reach
        assert not called, f"{path} calls {called}"
