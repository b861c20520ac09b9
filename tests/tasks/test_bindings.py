"""Bindings in text: what is told is what is asked for, in other words, and what has a label."""

import re

import numpy as np
import pytest

from unimatrix import tokenization
from unimatrix.errors import InputError
from unimatrix.tasks import BindingsQuestion, BindingsText, choose_names
from unimatrix.tasks.wordings import FEW, MANY, UNSEEN, Wordings

WORDS = [f"{a}{b}{c}nder" for a in "bcdfgh" for b in "aeiou" for c in "lmnrstvw"]
TEXT = np.frombuffer((" ".join(WORDS) + ", and\nso on. ").encode() * 20, np.uint8)
NAMES = choose_names(TEXT, tests=False)


def compile_wording(wording: str) -> re.Pattern[str]:
    """Return what matches a wording, with the groups key and value."""
    pattern = re.escape(wording)
    pattern = pattern.replace(r"\{key\}", "(?P<key>[a-z]+)", 1)
    pattern = pattern.replace(r"\{key\}", "(?P=key)")
    return re.compile(pattern.replace(r"\{value\}", r"(?P<value>\d+)"))


TOLD = [compile_wording(wording) for wording in FEW.needles]
ASKED = [compile_wording(wording) for wording in FEW.questions]


def find(patterns: list[re.Pattern[str]], text: str) -> list[tuple[str, str]]:
    """Return the keys and values that a text tells or asks for."""
    found = (match for pattern in patterns for match in pattern.finditer(text))
    return [(match["key"], match["value"]) for match in found]


def test_every_document_asks_for_all_that_it_tells() -> None:
    batch = BindingsText(3000, TEXT, NAMES).build(3, 12)
    inputs, labels = batch["input_ids"].numpy(), batch["shift_labels"].numpy()
    assert (inputs[:, 0] == tokenization.BOS_ID).all()
    assert (inputs[:, 1:] == labels[:, :-1]).all()
    num_bindings, digits, plain = set(), set(), 0
    for row in labels:
        # Windows begin and end anywhere.
        for document in bytes(row.tolist()).decode().split("\n\n")[1:-1]:
            told, _, asked = document.partition("\n")
            pairs = find(TOLD, told)
            if not asked:
                plain += 1
                assert pairs == []
                continue
            assert sorted(find(ASKED, asked)) == sorted(pairs)
            assert {key for key, _ in pairs} <= set(NAMES)
            num_bindings.add(len(pairs))
            digits |= {len(value) for _, value in pairs}
    assert num_bindings == {1, 2, 3, 4, 6}
    assert digits == {1, 2, 3, 7}
    assert plain > 3


@pytest.mark.parametrize(("num_bytes", "num_keys"), [(200, 1), (400, 3), (1500, 8)])
def test_a_question_has_one_answer(num_bytes: int, num_keys: int) -> None:
    others = choose_names(TEXT, tests=True)
    assert not set(others) & set(NAMES)
    batch = BindingsQuestion(num_bytes, TEXT, others, num_keys=num_keys).build(1, 60)
    places = set()
    for inputs, labels in zip(*(part.tolist() for part in batch.values()), strict=True):
        assert len(inputs) == num_bytes
        assert labels[:-7] == [-100] * (num_bytes - 7)
        document = bytes([*inputs[1:], labels[-1]]).decode()
        told, _, asked = document.rpartition("\n")
        assert "\n" not in told
        pairs = find(TOLD, told)
        assert len(pairs) == len(dict(pairs)) == num_keys
        assert {len(value) for _, value in pairs} == {7}
        assert {key for key, _ in pairs} <= set(others)
        (key, value), *_ = find(ASKED, asked + ".")
        assert dict(pairs)[key] == value == bytes(labels[-7:]).decode()
        ordered = sorted(pairs, key=lambda pair: told.index(pair[1]))
        places.add([name for name, _ in ordered].index(key))
    assert places == set(range(num_keys))


@pytest.mark.parametrize("wordings", [FEW, MANY, UNSEEN], ids=["few", "many", "unseen"])
def test_sentences_have_a_key_and_a_value(wordings: Wordings) -> None:
    for sentence in wordings.needles + wordings.questions:
        fields = re.findall(r"\{(\w+)\}", sentence)
        assert {"key", "value"} <= set(fields) <= {"key", "value", "noun", "aside"}
        assert fields.count("value") == 1
    # What follows the value would tell where it ends.
    assert all(sentence.endswith("{value}.") for sentence in wordings.questions)
    kinds = {"number", "hex", "word", "code", "phrase"}
    assert set(wordings.kinds) <= kinds
    batch = BindingsQuestion(600, TEXT, NAMES, wordings, num_keys=3).build(0, 40)
    for inputs, labels in zip(*(part.tolist() for part in batch.values()), strict=True):
        assert bytes(labels[-7:]) in bytes(inputs[1:])
    windows = BindingsText(2000, TEXT, NAMES, wordings).build(0, 4)["shift_labels"]
    assert all(b"{" not in bytes(row) for row in windows.tolist())


def test_the_grammar_and_what_is_held_out_share_no_sentence() -> None:
    assert len(MANY.needles) >= 36
    assert len(MANY.questions) >= 20
    assert len(UNSEEN.needles) == len(UNSEEN.questions) == 10
    for seen in (FEW, MANY):
        assert not set(seen.needles + seen.questions) & set(UNSEEN.needles + UNSEEN.questions)


def test_examples_depend_on_seed_and_index_alone() -> None:
    for task in (BindingsText(300, TEXT, NAMES), BindingsQuestion(300, TEXT, NAMES, num_keys=2)):
        whole = task.build(5, 8)["input_ids"]
        part = task.build_batch(5, np.array([6, 2]))["input_ids"]
        assert (part == whole[[6, 2]]).all()
        assert (task.build(6, 8)["input_ids"] != whole).any(dim=1).all()


def test_wrong_arguments() -> None:
    with pytest.raises(InputError, match="has 0 words for names; give more text"):
        choose_names(TEXT[:3], tests=False)
    with pytest.raises(InputError, match=r"text has 50 bytes, too few for windows of 512"):
        BindingsText(512, TEXT[:50], NAMES)
    with pytest.raises(InputError, match="give one row of uint8"):
        BindingsText(512, TEXT.astype(np.int64), NAMES)
    with pytest.raises(InputError, match="num_keys is 8 and window_bytes 200; choose at least 1"):
        BindingsQuestion(200, TEXT, NAMES, num_keys=8)
    with pytest.raises(InputError, match="num_keys is 0"):
        BindingsQuestion(200, TEXT, NAMES, num_keys=0)
