import pytest

from unimatrix.errors import InputError
from unimatrix.tasks import ChainedRecall


@pytest.mark.parametrize("num_pairs", [1, 4, 16])
@pytest.mark.parametrize("extra", [0, 1, 20])
def test_every_chain_leads_from_its_question_to_its_answer(num_pairs, extra):
    batch = ChainedRecall(6 * num_pairs + extra, num_pairs).build(0, 20)
    end = 4 * num_pairs
    for inputs, labels in zip(
        batch["input_ids"].tolist(), batch["shift_labels"].tolist(), strict=True
    ):
        bindings = dict(zip(inputs[0:end:2], inputs[1:end:2], strict=True))
        assert len(bindings) == 2 * num_pairs
        asked = [t for t, label in enumerate(labels) if label != -100]
        assert len(asked) == num_pairs
        assert all(t >= end and (t - end) % 2 == 0 for t in asked)
        for t in asked:
            middle = bindings[inputs[t]]
            assert inputs[t] < 2048 <= middle < 4096 <= labels[t]
            assert bindings[middle] == labels[t]


def test_links_stand_in_either_order():
    inputs = ChainedRecall(12, 1).build(0, 2000)["input_ids"]
    first_link_first = (inputs[:, 0] < 2048).double().mean()
    assert abs(first_link_first - 0.5) < 0.06


@pytest.mark.parametrize(
    ("fields", "message"),
    [((64, 0), "choose 1 to 2047"), ((23, 4), "window_tokens is 23, too short for 4 chains")],
)
def test_refuses(fields, message):
    with pytest.raises(InputError, match=message):
        ChainedRecall(*fields)
