"""The residual context (E10): against a search; its match may be found before the forward pass."""

from typing import Any

import pytest
import torch

from tests.models import build_model, draw_ids
from tests.nn.streams import build_mixer, check_gradients, check_padding, check_split, draw_stream
from unimatrix.errors import InputError
from unimatrix.nn.residual_context import ResidualContext, ResidualRead
from unimatrix.ops.suffix_automaton import predict_from_suffix

# The token before; what followed the longest match, in the whole text and in the last of it.
VARIANTS = ("rosa", "core+suffix_automaton", "core+automaton-window")
variants = pytest.mark.parametrize("variant", VARIANTS)


def build(variant: str) -> ResidualContext:
    mixer: Any = build_mixer("residual_context", variant)
    return mixer


def search(ids: list[int], t: int, window: int | None) -> tuple[int, int]:
    """Return what followed the longest match of what ends at t, the last of several; its length."""
    most = t + 1 if window is None else window // 2
    first = 0 if window is None else max(0, t - window + most)
    best = (-1, 0)
    for j in range(first, t):
        length = 0
        while length <= j and length < most and ids[j - length] == ids[t - length]:
            length += 1
        if length and length >= best[1]:
            best = (ids[j + 1], length)
    return best


@variants
@torch.no_grad()
def test_equals_a_search(variant: str) -> None:
    mixer, stream = build(variant), draw_stream(2, 40)
    read, state = stream.read(mixer)
    assert isinstance(read, ResidualRead)
    for row, ids in enumerate(stream.ids.tolist()):
        for t in range(40):
            if variant == "rosa":
                told = ids[t - 1] if t else mixer.pad_token_id
            else:
                told, length = search(ids, t, mixer.window)
                assert read.match_lengths[row, t] == length
            assert read.predicted_ids[row, t] == told
            expected = mixer.embed.weight[told] if told >= 0 else 0 * mixer.embed.weight[0]
            assert torch.equal(read.context[row, t], expected)
    if variant == "rosa":
        assert read.match_lengths is state is None
    else:
        assert read.match_lengths.max() > 2
    assert mixer.runs_operator == (variant != "rosa")
    assert mixer.grows == (variant == "core+suffix_automaton")


@variants
@torch.no_grad()
def test_two_parts_equal_one_and_padding_is_nothing(variant: str) -> None:
    # Automata of one text may have grown differently: what they say is compared.
    check_split(build(variant), compares_states=False)
    check_padding(build(variant), compares_states=False)


@variants
def test_gradients(variant: str) -> None:
    check_gradients(build(variant), beside=())


def test_an_automaton_is_changed_in_place_where_it_is_given_up() -> None:
    mixer, stream = build("core+automaton-window"), draw_stream(2, 12)
    mixer.operator_options = {"backend": "native"}
    _, state = stream.cut(0, 8).read(mixer)
    copies = [tensor.clone() for tensor in state]
    rest = stream.cut(8, 12)
    _, after = rest.read(mixer, state)
    assert all(map(torch.equal, state, copies))
    tokens = rest.describe()._replace(gives_up_state=True)
    _, given_up = mixer(rest.source, tokens, state)
    assert given_up.tokens.data_ptr() == state.tokens.data_ptr()
    assert all(map(torch.equal, given_up, after))
    _, dropped = mixer(rest.source, tokens._replace(keeps_state=False), None)
    assert dropped is None


@pytest.mark.parametrize("variant", ["selective", "core+automaton-window"])
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
    model = build_model("selective").eval()
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
