import hashlib
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
    find_standard_library,
    read_lines,
)
from unimatrix.errors import InputError


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
