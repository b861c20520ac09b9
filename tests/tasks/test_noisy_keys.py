import re

import pytest
import torch

from unimatrix import tokenization
from unimatrix.errors import InputError
from unimatrix.tasks import NoisyKeys


def read_document(inputs, labels):
    """Return the document as text: the input without BOS, then the last label."""
    assert inputs[0] == tokenization.BOS_ID
    assert labels[:-4] == [-100] * (len(labels) - 4)
    document = bytes([*inputs[1:], labels[-1]])
    assert document[-4:] == bytes(labels[-4:])
    return document.decode()


def count_changes(one, other):
    return sum(a != b for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(("num_pairs", "num_tokens"), [(16, 512), (1, 20), (3, 41), (32, 330)])
def test_the_nearest_key_holds_the_answer(num_pairs, num_tokens):
    batch = NoisyKeys(num_pairs, num_tokens).build(0, 100)
    filler = num_tokens - 10 * num_pairs - 10
    form = re.compile(
        rf"((?:[a-z]{{4}}=[a-z]{{4}};){{{num_pairs}}})[a-z]{{{filler}}}\?([a-z]{{4}})=([a-z]{{4}})"
    )
    for inputs, labels in zip(
        batch["input_ids"].tolist(), batch["shift_labels"].tolist(), strict=True
    ):
        pairs, question, answer = form.fullmatch(read_document(inputs, labels)).groups()
        bindings = dict(pair.split("=") for pair in pairs.split(";")[:-1])
        keys = list(bindings)
        assert len(keys) == num_pairs
        assert all(
            count_changes(key, other) >= 3 for i, key in enumerate(keys) for other in keys[:i]
        )
        nearest = min(keys, key=lambda key: count_changes(key, question))
        assert count_changes(nearest, question) == 1
        assert bindings[nearest] == answer


def test_asked_pair_changed_place_and_letters_are_uniform():
    num_examples = 4000
    batch = NoisyKeys(4, 60).build(1, num_examples)
    inputs = batch["input_ids"]
    keys = inputs[:, 1:41].view(-1, 4, 10)[:, :, :4]
    changed = keys != inputs[:, None, -8:-4]  # [n, 4, 4]
    asked = changed.sum(-1).argmin(1)
    rows = torch.arange(num_examples)
    place = changed[rows, asked].int().argmax(1)
    shift = (inputs[rows, -8 + place] - keys[rows, asked, place]) % 26
    assert (shift > 0).all()
    for drawn, size in (
        (asked, 4),
        (place, 4),
        (shift - 1, 25),
        (keys[:, 3, 2] - 97, 26),
        (inputs[:, 6] - 97, 26),
        (inputs[:, 45] - 97, 26),
    ):
        counts = torch.bincount(drawn, minlength=size)
        expected = num_examples / size
        assert len(counts) == size
        assert (counts - expected).abs().max() < 6 * expected**0.5


def test_the_vocabulary_is_the_byte_tokenizers():
    assert NoisyKeys.vocab_size == tokenization.VOCAB_SIZE


@pytest.mark.parametrize(
    ("num_pairs", "num_tokens", "named"),
    [
        (0, 512, "num_pairs is 0; choose 1 to 32"),
        (33, 512, "num_pairs is 33; choose 1 to 32"),
        (16, 169, "window_tokens is 169, too short for 16 pairs; choose at least 170"),
    ],
)
def test_bad_arguments_are_refused(num_pairs, num_tokens, named):
    with pytest.raises(InputError, match=named):
        NoisyKeys(num_pairs, num_tokens)
