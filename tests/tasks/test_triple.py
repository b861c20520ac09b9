import numpy as np
import pytest
import torch

from unimatrix.errors import InputError
from unimatrix.tasks import TripleInteraction

RULES = ("copy", "affine", "gate", "lookup")


def read_example(inputs):
    """Parse one input by the paper's grammar; return the rule, the values of the tag, the layout.

    The layout holds a letter an item: ``r`` a record, ``c`` a chunk, ``.`` filler.
    """
    assert (inputs[0], inputs[-2]) == (1, 2)
    rule = RULES[inputs[1] - 49]
    body, values, layout = inputs[2:-2], {}, ""
    while body:
        if 6 <= body[0] <= 21:
            layout, body = layout + ".", body[1:]
            continue
        tag = body[0]
        assert 46 <= tag <= 48
        roles, width = (1, 3) if rule == "lookup" else (3, 7)
        for role, value in zip(body[1:width:2], body[2:width:2], strict=True):
            assert 22 + 8 * (role - 3) <= value < 30 + 8 * (role - 3)
            assert (tag, role) not in values
            values[tag, role] = (value - 22) % 8
        if roles == 3:
            assert body[1:7:2] == [3, 4, 5]
        layout, body = layout + ("r" if roles == 3 else "c"), body[width:]
    assert len(values) == 9
    return rule, [values[inputs[-1], role] for role in (3, 4, 5)], layout


def classify(rule, a, b, c):
    if rule == "copy":
        return a
    if rule == "affine":
        return (a + 2 * b + 3 * c) % 16
    if rule == "gate":
        return (a * (b + 1) + c * ((a ^ b) + 1)) % 16
    return TripleInteraction.lookup_table()[a, b, c]


@pytest.mark.parametrize("rule", [*RULES, None])
def test_sequences_follow_the_paper_and_the_label_is_the_rules_class(rule):
    batch = TripleInteraction(rule).build(0, 300)
    inputs, labels = batch["input_ids"], batch["shift_labels"]
    assert inputs.shape == labels.shape == (300, 49)
    assert inputs.max() < 53
    assert (labels[:, :-1] == -100).all()
    seen = set()
    for row, label in zip(inputs.tolist(), labels[:, -1].tolist(), strict=True):
        found, values, layout = read_example(row)
        assert label == 53 + classify(found, *values)
        assert sorted(layout) == sorted(
            "c" * 9 + "." * 18 if found == "lookup" else "rrr" + "." * 24
        )
        seen.add(found)
    assert seen == (set(RULES) if rule is None else {rule})


def test_rules_tags_and_values_are_uniform():
    num_examples = 8000
    inputs = TripleInteraction().build(1, num_examples)["input_ids"]
    first_values = [read_example(row)[1] for row in inputs[:2000].tolist()]
    for drawn, size in (
        (inputs[:, 1] - 49, 4),
        (inputs[:, -1] - 46, 3),
        *((torch.tensor(column), 8) for column in zip(*first_values, strict=True)),
    ):
        counts = torch.bincount(drawn, minlength=size)
        expected = len(drawn) / size
        assert len(counts) == size
        assert (counts - expected).abs().max() < 6 * expected**0.5


def test_gaps_and_order_are_random():
    inputs = TripleInteraction("copy").build(2, 2000)["input_ids"]
    layouts = [read_example(row)[2] for row in inputs.tolist()]
    # A record is first, or last, with probability 3 in 27 items.
    for place in (0, 13, -1):
        share = np.mean([layout[place] == "r" for layout in layouts])
        assert abs(share - 1 / 9) < 6 * (1 / 9 * 8 / 9 / 2000) ** 0.5
    first_tags = torch.stack([row[(row >= 46) & (row < 49)][0] for row in inputs]) - 46
    assert (torch.bincount(first_tags) - 2000 / 3).abs().max() < 6 * (2000 / 3) ** 0.5


def test_the_table_is_fixed_and_covers_the_classes():
    table = TripleInteraction.lookup_table()
    assert table.shape == (8, 8, 8)
    assert table[0, 0].tolist() == [13, 4, 12, 10, 13, 0, 5, 3]
    assert np.bincount(table.ravel(), minlength=16).min() > 20
    assert (TripleInteraction.lookup_table() == table).all()


def test_an_unknown_rule_is_refused():
    with pytest.raises(InputError, match=r"rule is 'gated'; choose copy.*Did you mean 'gate'"):
        TripleInteraction("gated")
