"""What is made of embeddings alone may be made of the table: it changes nothing."""

import pytest
import torch

from tests.models import build_model, draw_ids
from tests.nn.test_packed_weights import measure
from unimatrix.nn.selective_mixer import SelectiveMixer

SELECTIVE = ["unimatrix", "unimatrix+small", "unimatrix+hidden", "unimatrix+two-hops"]


@pytest.mark.parametrize("variant", SELECTIVE)
@pytest.mark.parametrize("training", [False, True])
def test_the_table_changes_nothing(variant, training, monkeypatch) -> None:
    model, ids = build_model(variant).train(training), draw_ids(2, 24)
    model.config.dropout = 0.0
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    used = []
    kept = SelectiveMixer._normalize_table

    def watch(*args):
        used.append(kept(*args) is not None)
        return kept(*args)

    monkeypatch.setattr(SelectiveMixer, "_normalize_table", watch)
    with_table = measure(model, ids)
    assert used == [True]
    monkeypatch.setattr(SelectiveMixer, "_normalize_table", lambda *_: None)
    torch.testing.assert_close(with_table, measure(model, ids), rtol=1e-9, atol=1e-12)


def test_where_the_table_is_not_used() -> None:
    model = build_model("unimatrix", dtype=torch.float32)
    mixer, embed = model.model.block.selective_mixer, model.get_input_embeddings()
    vocab_size = model.config.vocab_size
    assert mixer._normalize_table(embed, vocab_size).shape == embed.weight.shape
    assert mixer._normalize_table(embed, vocab_size - 1) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert mixer._normalize_table(embed, vocab_size) is None
    hook = embed.register_forward_hook(lambda *_: None)
    assert mixer._normalize_table(embed, vocab_size) is None
    hook.remove()
    model.bfloat16()
    assert mixer._normalize_table(embed, vocab_size) is None
