"""The residual context: what the automaton says may be found before the forward pass."""

import pytest
import torch

from tests.models import build_model, draw_ids
from unimatrix.errors import InputError
from unimatrix.ops.suffix_automaton import predict_from_suffix


@pytest.mark.parametrize("variant", ["unimatrix", "core+automaton-window"])
def test_a_match_found_before_changes_nothing(variant: str) -> None:
    model = build_model(variant).train()
    ids = draw_ids(2, 40)
    prediction, _ = predict_from_suffix(ids, window=model.config.automaton_window)
    results = []
    for match in (None, torch.stack(prediction, dim=-1)):
        model.zero_grad()
        torch.manual_seed(0)
        output = model(ids, labels=ids, suffix_match=match)
        output.loss.backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        assert output.past_key_values is None
        results.append([output.logits, output.loss, *grads])
    assert prediction.match_lengths.max() > 1
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)


def test_a_match_that_cannot_be_is_refused() -> None:
    model = build_model("unimatrix").eval()
    ids = draw_ids(2, 40)
    match = torch.zeros(2, 40, 2, dtype=torch.int64)
    with pytest.raises(InputError, match=r"\[2, 39, 2\] torch.int64; pass \[2, 40, 2\]"):
        model(ids, suffix_match=match[:, 1:])
    with pytest.raises(InputError, match="leave out cache and attention_mask"):
        model(ids, suffix_match=match, attention_mask=torch.ones_like(ids))
    with pytest.raises(InputError, match="leave out cache and attention_mask"):
        model(ids, suffix_match=match, use_cache=True)
    core = build_model("core").eval()
    with pytest.raises(InputError, match="residual_path 'suffix_automaton'"):
        core(ids, suffix_match=match)
    assert model(ids, suffix_match=match).past_key_values is None
