import os
import sys

import pytest

from unimatrix.data.files import LeftOut, find_file, find_files, walk
from unimatrix.errors import InputError


def list_names(root, spec):
    return [path.relative_to(root).as_posix() for path in find_files(str(spec))]


def test_a_folder_is_walked_in_path_order_without_hidden_files(write_tree):
    names = ["b.txt", "a/z.txt", "a/deep/er/x.bin", "a.txt", ".hidden", ".git/config", "a/.keep"]
    root = write_tree(dict.fromkeys(names, b"x"))
    assert list_names(root, root) == ["a.txt", "a/deep/er/x.bin", "a/z.txt", "b.txt"]


def test_a_hidden_folder_given_by_name_is_walked(write_tree):
    root = write_tree({".cache/a.txt": b"x"})
    assert list_names(root, root / ".cache") == [".cache/a.txt"]


def test_a_glob_takes_files_and_folders_once_in_order(write_tree):
    root = write_tree(dict.fromkeys(["b.py", "a.py", "c.txt", "sub/d.py", "sub/e.txt"], b"x"))
    assert list_names(root, root / "*.py") == ["a.py", "b.py"]
    assert list_names(root, root / "**" / "*.py") == ["a.py", "b.py", "sub/d.py"]
    assert list_names(root, root / "s*") == ["sub/d.py", "sub/e.txt"]
    everything = list_names(root, root / "**")
    assert sorted(everything) == ["a.py", "b.py", "c.txt", "sub/d.py", "sub/e.txt"]


def test_a_name_that_exists_is_no_glob(write_tree):
    root = write_tree({"[a].txt": b"x", "a.txt": b"x"})
    assert list_names(root, root / "[a].txt") == ["[a].txt"]


def test_home_is_expanded(write_tree, monkeypatch):
    root = write_tree({"a.txt": b"x"})
    monkeypatch.setenv("HOME", str(root))
    monkeypatch.setenv("USERPROFILE", str(root))
    assert list_names(root, "~/a.txt") == list_names(root, "~/*.txt") == ["a.txt"]


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        ("pystdlb", r"'pystdlb' is no file, .*Did you mean 'pystdlib'\?"),
        ("ROOT/bok.txt", r"bok.txt' is no file, .*Did you mean '.*book.txt'\?"),
        ("ROOT/nowhere/book.txt", r"is no file, folder, glob or corpus; .* enwik8, pystdlib"),
        ("ROOT/*.md", r"no file matches '.*\*.md'"),
        ("ROOT/blank", "blank' is empty"),
        ("ROOT/hollow", "folder '.*hollow' has no files"),
    ],
)
def test_what_cannot_be_found_is_an_error_that_names_it(write_tree, spec, named):
    root = write_tree({"book.txt": b"x", "blank": b"", "hollow/.hidden": b"x"})
    with pytest.raises(InputError, match=named):
        find_files(spec.replace("ROOT", str(root)), ("enwik8", "pystdlib"))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no named pipes in folders")
def test_a_pipe_is_refused_by_name_and_left_out_of_folders(write_tree):
    root = write_tree({"sub/a.txt": b"x"})
    os.mkfifo(root / "sub" / "pipe")
    with pytest.raises(InputError, match="no regular file"):
        find_files(str(root / "sub" / "pipe"))
    assert list_names(root, root / "sub") == list_names(root, root / "sub" / "*") == ["sub/a.txt"]


def test_a_folder_that_cannot_be_listed_is_an_error(write_tree, monkeypatch):
    root = write_tree({"a.txt": b"x"})

    def refuse(path):
        raise PermissionError(13, os.strerror(13), str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match=r"cannot list .*Permission denied"):
        find_files(str(root))


def test_one_file_means_one_file(write_tree):
    root = write_tree({"a.txt": b"x", "blank": b""})
    assert find_file(str(root / "a.txt")) == root / "a.txt"
    for spec, named in (
        ("b.txt", "no file '.*b.txt'"),
        ("", "no regular file"),
        ("blank", "empty"),
    ):
        with pytest.raises(InputError, match=named):
            find_file(str(root / spec))


RUN = {"record.json": b'{\n  "format_version": 1', "model.safetensors": b"x"}
PRODUCTS = {
    "run folders": [RUN, {"metrics.jsonl": b"x", "checkpoints/a": b"x"}],
    "saved models": [
        {"config.json": b"{}", "model.safetensors": b"x"},
        {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"},
    ],
    "caches": [{"CACHEDIR.TAG": b"Signature: 8a477f597d28d172789f06886806bc55\n", "x": b"x"}],
    "virtual environments": [{"pyvenv.cfg": b"x", "lib/a.py": b"x"}],
    "version control": [{"HEAD": b"x", "objects/a": b"x", "refs/b": b"x"}],
}


@pytest.mark.parametrize("way", [".", "**", "**/*", "*"])
@pytest.mark.parametrize(
    ("reason", "files"), [(key, files) for key, some in PRODUCTS.items() for files in some]
)
def test_what_programs_write_is_no_text(write_tree, reason, files, way):
    root = write_tree({"sub/a.txt": b"x", **{f"sub/out/{name}": b for name, b in files.items()}})
    left_out = LeftOut()
    found = find_files(str(root / "sub" / way), (), left_out)
    assert found == [root / "sub" / "a.txt"]
    assert left_out.describe() == f"{reason} ({root / 'sub' / 'out'})"


@pytest.mark.parametrize("name", ["__pycache__", "CVS", "_darcs"])
def test_some_folders_are_known_by_name(write_tree, name):
    root = write_tree({"a.txt": b"x", f"{name}/b.txt": b"x"})
    assert list_names(root, root) == list_names(root, root / "**" / "*.txt") == ["a.txt"]


def test_what_is_named_itself_is_taken(write_tree):
    root = write_tree({f"runs/one/{name}": data for name, data in RUN.items()})
    assert len(find_files(str(root / "runs" / "one"))) == len(RUN)
    assert len(find_files(str(root / "runs" / "*" / "record.json"))) == 1
    with pytest.raises(InputError, match=r"left out here: run folders \(.*one\)"):
        find_files(str(root / "runs"))


def test_records_and_tags_of_others_are_text(write_tree):
    files = {
        "record.json": b'{"song": "x"}',
        "CACHEDIR.TAG": b"x",
        "config.json": b"{}",
        "HEAD": b"",
    }
    root = write_tree({f"sub/{name}": data for name, data in files.items()})
    assert len(find_files(str(root))) == len(files)


def test_a_walk_says_which_links_it_does_not_follow(write_tree):
    root = write_tree({"d/a.txt": b"x", "other/b.txt": b"x"})
    (root / "d" / "loop").symlink_to(root / "d")
    (root / "d" / "more").symlink_to(root / "other")
    left_out = LeftOut()
    assert walk(root / "d", left_out) == [root / "d" / "a.txt"]
    assert left_out.describe() == f"links to folders ({root / 'd/loop'}, {root / 'd/more'})"


def test_two_stars_follow_links_to_each_folder_once(write_tree):
    root = write_tree({"d/a.txt": b"x", "d/e/c.txt": b"x", "other/b.txt": b"x"})
    for name in ("loop", "loop2", "e/up"):
        (root / "d" / name).symlink_to(root / "d")
    (root / "d" / "more").symlink_to(root / "other")
    expected = ["d/a.txt", "d/e/c.txt", "d/more/b.txt"]
    for pattern in ("d/**/*.txt", "d/**", "**/d/**/*.txt"):
        assert list_names(root, root / pattern) == expected


def test_relative_patterns_stay_relative(write_tree, monkeypatch):
    monkeypatch.chdir(write_tree({"d/a.txt": b"x", "d/e/b.txt": b"x"}))
    assert [str(path) for path in find_files("d/**/*.txt")] == ["d/a.txt", "d/e/b.txt"]
    assert [str(path) for path in find_files("**")] == ["d/a.txt", "d/e/b.txt"]
    assert [str(path) for path in find_files("d/../d/*")] == ["d/../d/a.txt", "d/../d/e/b.txt"]


def test_runs_that_began_before_find_what_they_found_then(write_tree):
    names = ["a.txt", "__pycache__/b.txt", "runs/c/record.json", "runs/c/model.safetensors", ".h"]
    root = write_tree(dict.fromkeys(names, RUN["record.json"]))
    (root / "runs" / "loop").symlink_to(root)
    expected = [root / name for name in sorted(names[:4])]
    assert find_files(str(root), as_before=True) == expected
    assert find_files(str(root / "a.txt"), as_before=True) == [root / "a.txt"]
    everything = find_files(str(root / "**" / "*.txt"), as_before=True)
    assert len(everything) > 2 * len(set(map(os.path.realpath, everything)))
