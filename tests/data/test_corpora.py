import hashlib
import json
import os
import sys
import sysconfig
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from unimatrix.data import CORPUS_NAMES, ByteStream, corpora, load_corpus
from unimatrix.data.corpora import choose_split, join_lines, load_stored_corpus, make_absolute
from unimatrix.errors import InputError
from unimatrix.tokenization import BOS_ID, EOS_ID

TEXT = bytes(range(256)) * 4  # 1,024 bytes
WIKI = b" \r\n = Title = \r\n\r\n  A \xc3\xa9 line . \r\n\t\nlast"
JOINED = "= Title =\nA é line .\nlast".encode()


def read_all(stream):
    return stream.read(0, len(stream)).tobytes()


def read_splits(corpus):
    test = None if corpus.test is None else read_all(corpus.test)
    return read_all(corpus.train), read_all(corpus.valid), test


def test_the_standard_library_is_split_by_the_hash_of_each_path():
    corpus = load_corpus("pystdlib")
    root = Path(sysconfig.get_paths()["stdlib"])
    barred = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    chosen = {"train": [], "valid": [], "test": []}
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if barred & set(relative.parts[:-1]) or any(part[0] == "." for part in relative.parts):
            continue
        digest = hashlib.sha256(relative.as_posix().encode()).hexdigest()
        split = {0: "valid", 1: "test"}.get(int(digest, 16) % 20, "train")
        chosen[split].append((digest, path))
    for split, files in chosen.items():
        expected = b"".join(path.read_bytes() for _, path in sorted(files))
        assert read_all(getattr(corpus, split)) == expected
    assert corpus.name == "pystdlib"
    assert len(corpus.valid) > 131_072
    assert not corpus.train.ends_with_eos


@pytest.mark.parametrize(("remainder", "split"), [(0, "valid"), (1, "test"), (2, "train")])
def test_one_path_in_twenty_validates_and_one_tests(remainder, split):
    names = [f"package/module{number}.py" for number in range(200)]
    hashes = [int(hashlib.sha256(name.encode()).hexdigest(), 16) % 20 for name in names]
    matching = [name for name, value in zip(names, hashes, strict=True) if value == remainder]
    assert matching
    assert {choose_split(name) for name in matching} == {split}


@pytest.mark.parametrize("num_bytes", [20, 39, 1000, 1019])
def test_the_last_five_percent_of_a_users_bytes_validate(write_tree, num_bytes):
    root = write_tree(
        {"a": TEXT[:1000][: num_bytes // 2], "b": (TEXT * 2)[num_bytes // 2 : num_bytes]}
    )
    corpus = load_corpus(str(root))
    whole = (root / "a").read_bytes() + (root / "b").read_bytes()
    border = num_bytes - num_bytes // 20
    assert read_splits(corpus) == (whole[:border], whole[border:], None)


def test_files_folders_and_globs_join_in_the_order_given(write_tree):
    root = write_tree(
        {"one/b": b"2" * 20, "one/a": b"1" * 20, "z.txt": b"z" * 20, "y.txt": b"y" * 20}
    )
    corpus = load_corpus([root / "z.txt", str(root / "one"), str(root / "y*")])
    assert b"".join(read_splits(corpus)[:2]) == b"z" * 20 + b"1" * 20 + b"2" * 20 + b"y" * 20


def test_validation_data_leaves_all_the_rest_to_training(write_tree):
    root = write_tree({"train": TEXT, "valid": b"held out"})
    corpus = load_corpus(str(root / "train"), str(root / "valid"))
    assert read_splits(corpus) == (TEXT, b"held out", None)


def test_validation_data_replaces_the_split_of_a_named_corpus(write_tree):
    root = write_tree({"valid": b"held out", "train": TEXT})
    own = load_corpus("pystdlib")
    mixed = load_corpus("pystdlib", str(root / "valid"))
    assert read_splits(mixed) == (read_all(own.train), b"held out", read_all(own.test))
    turned = load_corpus(str(root / "train"), "pystdlib")
    assert read_splits(turned) == (TEXT, read_all(own.valid), None)


def test_large_files_stay_on_disk_and_split_the_same(write_tree, monkeypatch):
    root = write_tree({"a": TEXT[:700], "b": TEXT[700:]})
    joined = load_corpus(str(root))
    reading = partial(ByteStream.from_files, join_limit_bytes=100)
    monkeypatch.setattr(ByteStream, "from_files", staticmethod(reading))
    mapped = load_corpus(str(root))
    assert read_splits(mapped) == read_splits(joined)
    assert mapped.train._files
    assert not joined.train._files
    assert mapped.sha256 == joined.sha256


def test_the_hash_covers_every_split_and_its_borders(write_tree):
    root = write_tree({"a": b"ab", "b": b"bc", "c": b"abb", "d": b"c", "e": b"x"})
    pairs = [("a", "b"), ("c", "d"), ("a", "d"), ("b", "a"), ("a", "e")]
    hashes = [load_corpus(str(root / train), str(root / valid)).sha256 for train, valid in pairs]
    assert len(set(hashes)) == len(pairs)
    assert load_corpus(str(root / "a"), str(root / "b")).sha256 == hashes[0]
    assert all(len(value) == 64 for value in hashes)


def test_the_hash_of_a_long_split_still_covers_its_length(write_tree, monkeypatch):
    monkeypatch.setattr(corpora, "HASHED_BYTES", 2)
    root = write_tree({"a": b"abc", "b": b"abcd", "valid": b"x"})
    hashes = {load_corpus(str(root / name), str(root / "valid")).sha256 for name in "ab"}
    assert len(hashes) == 2


def test_lines_are_joined_as_the_paper_does():
    assert join_lines([" \n", " = Title = \n", "", " A é line . \n", "\u3000last\u3000"]) == JOINED


def test_a_raw_wikitext_file_is_joined_the_same_way(write_tree):
    root = write_tree({"train.raw": WIKI, "valid.raw": b"\n held \n\n out\n"})
    corpus = load_corpus(f"wikitext2:{root / 'train.raw'}", f"wikitext2:{root / 'valid.raw'}")
    assert read_splits(corpus) == (JOINED, b"held\nout", None)
    for stream in (corpus.train, corpus.valid):
        tokens = stream.read_tokens(0, stream.num_tokens)
        assert tokens.tolist() == [BOS_ID, *read_all(stream), EOS_ID]


def test_a_raw_wikitext_file_alone_validates_on_its_end(write_tree):
    root = write_tree({"train.raw": WIKI})
    corpus = load_corpus(f"wikitext2:{root / 'train.raw'}")
    assert read_splits(corpus) == (JOINED[:-1], JOINED[-1:], None)
    assert corpus.valid.ends_with_eos


def test_wikitext2_has_its_three_splits(monkeypatch):
    lines = {split: ["", f" {split} \n", " x\n"] for split in ("train", "validation", "test")}
    monkeypatch.setattr(corpora, "fetch_wikitext2", lambda: lines)
    corpus = load_corpus("wikitext2")
    assert read_splits(corpus) == (b"train\nx", b"validation\nx", b"test\nx")
    assert corpus.train.ends_with_eos
    assert corpus.valid.ends_with_eos


@pytest.mark.parametrize("name", ["enwik8", "text8"])
def test_the_hundred_million_byte_corpora_split_by_convention(tmp_path, name, monkeypatch):
    path = tmp_path / "file"
    with path.open("wb") as file:
        for start, mark in ((0, b"train"), (90_000_000, b"valid"), (95_000_000, b"test!")):
            file.seek(start)
            file.write(mark)
        file.truncate(100_000_000)
    monkeypatch.setattr(corpora, "fetch_archive", lambda asked, folder: tmp_path / "file")
    for corpus in (load_corpus(f"{name}:{path}"), load_corpus(name)):
        streams = (corpus.train, corpus.valid, corpus.test)
        assert [len(stream) for stream in streams] == [90_000_000, 5_000_000, 5_000_000]
        assert [stream.read(0, 5).tobytes() for stream in streams] == [b"train", b"valid", b"test!"]


def test_downloads_go_where_the_caller_says(monkeypatch, tmp_path):
    asked = []

    def fetch(name, folder):
        asked.append((name, folder))
        raise InputError("stop")

    monkeypatch.setattr(corpora, "fetch_archive", fetch)
    with pytest.raises(InputError, match="stop"):
        load_corpus("text8", cache_folder=tmp_path)
    assert asked == [("text8", tmp_path)]


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ("wikitext", r"'wikitext' is no file.*Did you mean 'wikitext2'\?"),
        ("wikitext3:FILE", r"'wikitext3:FILE' is no file"),
        ([], "list of data is empty"),
        (["pystdlib", "ROOT/short"], "'pystdlib' joins no other data"),
        (["ROOT/short", "enwik8:ROOT/short"], "'enwik8:.*joins no other data"),
        ("pystdlib:x", "pystdlib takes no file, got 'x'"),
        ("ROOT/short", r"short \(valid\)' has no bytes.*--valid-data"),
        ("ROOT/hollow", "hollow' has no bytes"),
        ("ROOT/blank", "blank' is empty"),
        ("wikitext2:ROOT/gone", "no file '.*gone'"),
        ("wikitext2:ROOT/spaces", "wikitext2:.*has no bytes"),
        ("enwik8:ROOT/short", "has 19 bytes but enwik8 has 100,000,000"),
        ("text8:ROOT/gone", "no file '.*gone'"),
    ],
)
def test_what_cannot_be_used_is_an_error_that_names_it(write_tree, data, named):
    root = write_tree({"short": b"x" * 19, "hollow/a": b"", "blank": b"", "spaces": b" \n \n"})
    listed = [data] if isinstance(data, str) else data
    specs = [spec.replace("ROOT", str(root)) for spec in listed]
    with pytest.raises(InputError, match=named) as caught:
        load_corpus(specs[0] if isinstance(data, str) else specs)
    assert "\n" not in str(caught.value)


def test_each_real_file_counts_once_whatever_leads_to_it(write_tree, caplog):
    root = write_tree({"a.txt": b"a" * 40, "sub/b.txt": b"b" * 40})
    (root / "loop").symlink_to(root)
    (root / "sub" / "again.txt").symlink_to(root / "a.txt")
    (root / "sub" / "hard.txt").hardlink_to(root / "sub" / "b.txt")
    specs = [str(root / "**" / "*.txt"), str(root / "sub"), str(root / "a.txt"), str(root / "loop")]
    assert b"".join(read_splits(load_corpus(specs))[:2]) == b"a" * 40 + b"b" * 40
    assert f"files met before ({root / 'a.txt'}, " in caplog.text


def test_what_is_left_out_is_said(write_tree, caplog):
    root = write_tree({"a.txt": TEXT, "__pycache__/a.pyc": b"x", ".git/config": b"x"})
    assert len(load_corpus(str(root)).train) == len(TEXT) - len(TEXT) // 20
    assert caplog.messages == [
        f"left out of {root}: hidden ({root / '.git'}); caches ({root / '__pycache__'})"
    ]
    caplog.clear()
    load_corpus(str(root / "a.txt"))
    load_corpus("pystdlib")
    assert not caplog.messages


def test_validation_text_that_is_trained_on_is_said(write_tree, caplog):
    root = write_tree({"d/a.txt": TEXT, "d/b.txt": TEXT})
    load_corpus(str(root / "d"), str(root / "d" / "b.txt"))
    assert caplog.messages == [f"{root / 'd' / 'b.txt'}: both trained on and validated on"]


def test_bytes_that_no_compressor_helps_are_said(write_tree, caplog):
    noise = np.random.default_rng(0).bytes(40_000)
    root = write_tree({"noise": noise, "words": b"some words " * 40_000, "all": TEXT * 99})
    for name in ("words", "all"):
        load_corpus(str(root / name))
    assert not caplog.messages
    load_corpus([str(root / "words"), str(root / "noise")])
    assert "about 8 % of the bytes of" in caplog.text
    assert "at nearly 8 bits a byte" in caplog.text


def test_a_file_called_like_a_corpus_needs_a_word_more(write_tree, monkeypatch):
    monkeypatch.chdir(write_tree({"text8": TEXT, "pystdlib/a.py": TEXT}))
    monkeypatch.setattr(corpora, "fetch_archive", lambda *_: pytest.fail("downloads"))
    with pytest.raises(
        InputError, match=r"also a file here; write \./text8 .*, text8:text8 .* text8: "
    ):
        load_corpus("text8")
    with pytest.raises(InputError, match=r"also a folder here; write \./pystdlib .* pystdlib: for"):
        load_corpus("./text8", "pystdlib")
    assert read_splits(load_corpus("./text8", "./pystdlib")) == (TEXT, TEXT, None)
    assert load_corpus("pystdlib:").name == "pystdlib"
    with pytest.raises(InputError, match="'text8' has 1,024 bytes"):
        load_corpus("text8:text8")


def test_stored_specs_mean_the_same_everywhere(write_tree, monkeypatch):
    root = write_tree({"[x]/d/a.txt": TEXT, "[x]/d/sub/b.txt": TEXT, "[x]/wiki.raw": WIKI})
    (root / "elsewhere" / "pystdlib").mkdir(parents=True)
    monkeypatch.chdir(root / "[x]")
    for spec in ("d", "d/*.txt", "./d/../d/**", "wikitext2:wiki.raw", "pystdlib", "pystdlib:", "."):
        monkeypatch.chdir(root / "[x]")
        expected = load_corpus(spec).sha256
        stored = make_absolute([spec])
        monkeypatch.chdir(root / "elsewhere")
        assert load_stored_corpus(stored).sha256 == expected
        assert make_absolute(stored) == stored


@pytest.mark.skipif(sys.platform != "linux", reason="other systems want file names in Unicode")
def test_names_that_are_not_utf8(tmp_path, monkeypatch):
    # Not through the log: what pytest shows of it goes to another process, as text.
    said = []
    monkeypatch.setattr(corpora._logger, "warning", lambda text, *given: said.append(text % given))
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    folder.mkdir()
    (folder / os.fsdecode(b"\xff.txt")).write_bytes(TEXT)
    (folder / os.fsdecode(b".\xfe")).write_bytes(TEXT)
    for spec in (folder, os.path.join(folder, "*.txt"), make_absolute([str(folder)])[0]):
        corpus = load_corpus(json.loads(json.dumps(os.fspath(spec))))
        assert read_all(corpus.train) == TEXT[: -(len(TEXT) // 20)]
    assert choose_split(corpus.name) in ("train", "valid", "test")
    assert len(corpus.sha256) == 64
    assert ".\udcfe" in said[0]


def test_bad_validation_data_is_an_error_too(write_tree):
    root = write_tree({"train": TEXT})
    with pytest.raises(InputError, match="'nowhere' is no file"):
        load_corpus(str(root / "train"), "nowhere")


def test_a_long_list_has_a_short_name(write_tree):
    root = write_tree({f"{number}": b"x" * 9 for number in range(6)})
    corpus = load_corpus([str(root / f"{number}") for number in range(6)])
    assert corpus.name.endswith("2 and 3 more")
    assert corpus.valid.name == f"{corpus.name} (valid)"


def test_every_named_corpus_is_listed():
    assert CORPUS_NAMES == ("enwik8", "pystdlib", "text8", "wikitext2")


@pytest.mark.network
def test_wikitext2_can_be_downloaded():
    corpus = load_corpus("wikitext2")
    assert 10_000_000 < len(corpus.train) < 12_000_000
    assert 1_000_000 < len(corpus.valid) < len(corpus.test) < 1_400_000
    assert b"\n\n" not in read_all(corpus.valid)


@pytest.mark.network
def test_text8_can_be_downloaded(tmp_path):
    corpus = load_corpus("text8", cache_folder=tmp_path)
    assert set(read_all(corpus.valid)) <= set(b" abcdefghijklmnopqrstuvwxyz")
