import hashlib
import os
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from unimatrix.data import sources
from unimatrix.data.sources import (
    Archive,
    fetch_archive,
    fetch_wikitext2,
    find_file,
    find_files,
    find_standard_library,
    read_lines,
)
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


def test_the_standard_library_leaves_out_tests_and_installed_packages(write_tree):
    kept = ["os.py", "testing.py", "test.py", "email/mime/text.py", "mytests/a.py", "lib/b.py"]
    dropped = [
        "test/a.py",
        "tests/a.py",
        "unittest/test/a.py",
        "lib2to3/tests/data/a.py",
        "idlelib/idle_test/a.py",
        "site-packages/torch/a.py",
        "dist-packages/a.py",
        "os.pyc",
        "LICENSE.txt",
        ".hidden.py",
        ".venv/a.py",
    ]
    root = write_tree(dict.fromkeys([*kept, *dropped], b"x"))
    found = find_standard_library(root)
    assert set(found) == set(kept)
    assert list(found) == sorted(kept, key=lambda name: hashlib.sha256(name.encode()).digest())
    assert found["email/mime/text.py"] == root / "email" / "mime" / "text.py"


def test_a_python_without_sources_is_an_error(write_tree):
    root = write_tree({"test/a.py": b"x", "os.pyc": b"x"})
    with pytest.raises(InputError, match=r"no standard-library sources in .*--data"):
        find_standard_library(root)


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """Publish a small ``enwik8`` at a file address; return its content, archive and cache."""
    content = bytes(range(250)) * 4
    packed = tmp_path / "published.zip"
    with zipfile.ZipFile(packed, "w") as members:
        members.writestr("enwik8", content)

    def publish(**changes):
        digest = hashlib.md5(content, usedforsecurity=False).hexdigest()
        published = Archive(packed.as_uri(), len(content), digest)._replace(**changes)
        monkeypatch.setitem(sources.ARCHIVES, "enwik8", published)

    publish()
    cache = tmp_path / "cache" / "corpora"
    return SimpleNamespace(content=content, packed=packed, cache=cache, publish=publish)


def test_an_archive_is_downloaded_once(archive):
    path = fetch_archive("enwik8", archive.cache)
    assert path.read_bytes() == archive.content
    archive.packed.unlink()
    assert fetch_archive("enwik8", archive.cache) == path
    assert list(archive.cache.iterdir()) == [path]


def break_nothing_but_the_address(archive):
    archive.publish(url=archive.packed.with_name("gone.zip").as_uri())


def break_the_sum(archive):
    archive.publish(md5="0" * 32)


def break_the_zip(archive):
    archive.packed.write_bytes(b"<html>not found</html>")


def break_the_member(archive):
    with zipfile.ZipFile(archive.packed, "w") as members:
        members.writestr("something else", b"x")


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (break_nothing_but_the_address, "gone.zip"),
        (break_the_sum, "MD5"),
        (break_the_zip, "not a zip"),
        (break_the_member, "no item named"),
    ],
)
def test_a_failed_download_leaves_nothing_and_says_the_way_out(archive, spoil, named):
    spoil(archive)
    with pytest.raises(InputError, match=f"(?s)cannot get enwik8.*{named}.*--data enwik8:FILE"):
        fetch_archive("enwik8", archive.cache)
    assert list(archive.cache.iterdir()) == []


def test_the_published_archives_have_the_sizes_of_the_split_convention():
    assert {name: archive.num_bytes for name, archive in sources.ARCHIVES.items()} == {
        "enwik8": 100_000_000,
        "text8": 100_000_000,
    }
    assert all(archive.url.startswith("https://") for archive in sources.ARCHIVES.values())


class FakeDatasetsError(Exception):
    pass


def fake_datasets(load_dataset):
    return SimpleNamespace(
        load_dataset=load_dataset, exceptions=SimpleNamespace(DatasetsError=FakeDatasetsError)
    )


def test_wikitext2_comes_from_datasets(monkeypatch):
    asked = []

    def load_dataset(*names):
        asked.append(names)
        return {split: {"text": [split, ""]} for split in ("train", "validation", "test")}

    monkeypatch.setitem(sys.modules, "datasets", fake_datasets(load_dataset))
    assert fetch_wikitext2()["validation"] == ["validation", ""]
    assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1")]


def test_without_datasets_the_error_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r'pip install "unimatrix-lm\[data\]".*wikitext2:FILE'):
        fetch_wikitext2()


@pytest.mark.parametrize(
    "failure",
    [ConnectionError("Couldn't reach it\nat all"), FakeDatasetsError("broken"), OSError()],
)
def test_without_a_network_the_error_says_the_way_out(monkeypatch, failure):
    def load_dataset(*names):
        raise failure

    monkeypatch.setitem(sys.modules, "datasets", fake_datasets(load_dataset))
    with pytest.raises(InputError, match=r"cannot get .*wikitext2:FILE") as caught:
        fetch_wikitext2()
    assert "\n" not in str(caught.value)


def test_lines_end_as_files_end_them(write_tree):
    root = write_tree(
        {"unix": b"a\nb\n\nc", "dos": b"a\r\nb\r\n\r\nc", "odd": "a\u2028b\x0cc".encode()}
    )
    for name in ("unix", "dos"):
        assert [line.strip() for line in read_lines(root / name)] == ["a", "b", "", "c"]
    assert read_lines(root / "odd") == ["a\u2028b\x0cc"]


def test_lines_that_are_no_text_are_an_error(write_tree):
    root = write_tree({"binary": b"ok\n\xff"})
    with pytest.raises(InputError, match="not UTF-8 at byte 3"):
        read_lines(root / "binary")
    with pytest.raises(InputError, match=r"cannot read .*No such file"):
        read_lines(Path(root, "gone"))
