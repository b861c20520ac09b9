import re

import numpy as np
import pytest
import torch

from unimatrix import tokenization
from unimatrix.errors import InputError
from unimatrix.tasks import Needle

# Each byte tells its place in the text, up to the period.
TEXT = (np.arange(3000) % 251).astype(np.uint8)
FORM = re.compile(
    rb"(.*)The secret number of ([A-Z][a-z]{4,7}) is ([1-9][0-9]{6})\."
    rb"(.*)\nThe secret number of ([A-Z][a-z]{4,7}) is ([0-9]{7})",
    re.DOTALL,
)


def read_document(inputs, labels):
    """Return before, name, digits, after, name, digits of one example."""
    assert inputs[0] == tokenization.BOS_ID
    assert labels[:-7] == [-100] * (len(labels) - 7)
    document = bytes([*inputs[1:], labels[-1]])
    assert document[-7:] == bytes(labels[-7:])
    return FORM.fullmatch(document).groups()


@pytest.mark.parametrize("num_tokens", [82, 300, 1001])
def test_the_sentence_replaces_text_at_each_depth_and_its_digits_are_the_answer(num_tokens):
    batch = Needle(num_tokens, TEXT).build(0, 60)
    assert batch["input_ids"].shape == (60, num_tokens)
    rows = zip(batch["input_ids"].tolist(), batch["shift_labels"].tolist(), strict=True)
    for index, (inputs, labels) in enumerate(rows):
        before, name, digits, after, asked, answer = read_document(inputs, labels)
        assert (name, digits) == (asked, answer)
        room = len(before) + len(after)
        assert len(before) == round(index % 10 * room / 9)
        # The window runs on under the sentence.
        hidden = len(f"The secret number of {name.decode()} is 1234567.")
        window = [*before, *[None] * hidden, *after]
        first = next((byte - place for place, byte in enumerate(window) if byte is not None), 0)
        assert all(
            byte is None or byte == (first + place) % 251 for place, byte in enumerate(window)
        )


def test_names_numbers_and_windows_are_random():
    inputs = Needle(150, TEXT).build(1, 1000)["input_ids"][10::10, 1:]  # depth 0
    found = [re.search(rb"of (\w+) is (\d)", bytes(row)) for row in inputs.tolist()]
    assert {len(match[1]) for match in found} == {5, 6, 7, 8}
    assert {match[2] for match in found} == {b"%d" % digit for digit in range(1, 10)}
    assert len({match[1] for match in found}) == len(found)
    assert len(torch.unique(inputs[:, 60])) > 50


@pytest.mark.parametrize("num_bytes", [82, 1001])
def test_decoys_are_other_numbers_of_the_text(num_bytes):
    letters = np.full(3000, ord("x"), np.uint8)
    batch = Needle(num_bytes, letters, num_decoys=8).build(2, 50)
    rows = zip(batch["input_ids"].tolist(), batch["shift_labels"].tolist(), strict=True)
    lengths = set()
    for inputs, labels in rows:
        before, name, digits, after, asked, answer = read_document(inputs, labels)
        assert (name, digits) == (asked, answer)
        found = re.findall(rb" ([0-9]+)", before + b"|" + after)
        assert len(found) <= 8
        lengths |= set(map(len, found))
    assert num_bytes == 82 or lengths >= {1, 2, 3, 4, 5, 6, 7}


def test_a_text_of_one_window_will_do():
    text = TEXT[:200].copy()
    before = text.copy()
    batch = Needle(200, text).build(0, 10)
    assert batch["input_ids"].shape == (10, 200)
    assert (text == before).all()


def test_tasks_are_compared_by_identity_and_named_without_their_text():
    task = Needle(200, TEXT)
    assert task == task
    assert task != Needle(200, TEXT)
    assert repr(task) == "Needle(window_bytes=200, num_decoys=0)"


@pytest.mark.parametrize(
    ("num_bytes", "text", "named"),
    [
        (81, TEXT, "window_bytes is 81, .*choose at least 82"),
        (200, TEXT[:199], "text has 199 bytes, too few for windows of 200"),
        (200, TEXT.astype(np.int64), "type int64; give one row of uint8"),
        (200, TEXT.reshape(2, -1), r"shape \(2, 1500\)"),
    ],
)
def test_bad_arguments_are_refused(num_bytes, text, named):
    with pytest.raises(InputError, match=named):
        Needle(num_bytes, text)


def test_negative_decoys_are_refused():
    with pytest.raises(InputError, match="num_decoys is -1"):
        Needle(200, TEXT, -1)
