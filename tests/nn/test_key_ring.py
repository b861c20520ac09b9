"""Keys that are kept from call to call: nothing but speed depends on them."""

import copy
from unittest import mock

import pytest
import torch
from torch import Tensor

from tests.byte_models import build_byte_model
from unimatrix import UniMatrixForCausalLM
from unimatrix.nn import key_ring
from unimatrix.nn.indexed_attention import IndexedAttention

TEXT = b"The code of harkov is 5202798. Nothing else was said that day, and the rain went on; " * 40
W = 512


@pytest.fixture
def model() -> UniMatrixForCausalLM:
    """Return a small model in float64 whose weights are far from their start."""
    built = build_byte_model("unimatrix", automaton_window=W, index_head_dim=4).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in built.parameters():
            noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            weight.add_(noise * 0.1)
    return built


def encode(*rows: bytes) -> Tensor:
    return torch.tensor([list(row) for row in rows])


def count_made(model: UniMatrixForCausalLM) -> "mock._patch[mock.Mock]":
    """Watch for how many tokens keys are made."""
    make = IndexedAttention.make_keys
    return mock.patch.object(IndexedAttention, "make_keys", autospec=True, side_effect=make)


def list_made(watched: mock.Mock) -> list[int]:
    return [call.args[1].numel() for call in watched.call_args_list]


def read(model: UniMatrixForCausalLM, ids: Tensor, sizes: list[int], **options) -> Tensor:
    """Return the logits of a text that is read in pieces, the sizes in turn."""
    cache, logits, first = None, [], 0
    while first < ids.shape[1]:
        piece = ids[:, first : first + sizes[len(logits) % len(sizes)]]
        output = model(piece, past_key_values=cache, use_cache=True, **options)
        cache, first = output.past_key_values, first + piece.shape[1]
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("sizes", [[300], [256, 1, 700, 30, 2], [5, 400], [4096], [40]])
@pytest.mark.parametrize("gives_up", [False, True])
@torch.no_grad()
def test_pieces_are_one_pass(model, sizes: list[int], gives_up: bool) -> None:
    ids = encode(TEXT[:2000], TEXT[33:2033])
    expected = model(ids, use_cache=False).logits
    found = read(model, ids, sizes, gives_up_cache=gives_up)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_rows_of_other_lengths(model) -> None:
    texts = [TEXT[:1400], TEXT[50:900], TEXT[90:1000]]
    ids = torch.zeros(3, 1400, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, 1400 - len(text) :] = torch.tensor(list(text))
        mask[row, 1400 - len(text) :] = 1
    cache, logits = None, []
    for first in range(0, 1400, 350):
        piece = slice(first, first + 350)
        output = model(
            ids[:, piece], attention_mask=mask[:, piece], past_key_values=cache, use_cache=True
        )
        cache = output.past_key_values
        logits.append(output.logits)
    found = torch.cat(logits, dim=1)
    for row, text in enumerate(texts):
        expected = model(encode(text), use_cache=False).logits[0]
        torch.testing.assert_close(found[row, -len(text) :], expected, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_keys_are_made_of_new_tokens_alone(model) -> None:
    ids = encode(TEXT[:2000])
    with count_made(model) as made:
        read(model, ids, [400])
    # With each piece come the 23 tokens before it, whose keys it completes.
    assert list_made(made) == [400, *[423] * 4]


@torch.no_grad()
def test_a_cache_that_is_not_the_last_goes_on_too(model) -> None:
    ids = encode(TEXT[:1600])
    expected = model(ids, use_cache=False).logits
    first = model(ids[:, :800], use_cache=True).past_key_values
    other = ids[:, 800:].flip(1)
    model(other, past_key_values=first, use_cache=True)
    rows = torch.tensor([0, 0])
    for cache in (first, first.select_rows(rows)):
        found = model(
            ids[:, 800:].expand(cache.batch_size, -1), past_key_values=cache, use_cache=True
        ).logits
        wanted = expected[:, 800:].expand(cache.batch_size, -1, -1)
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_two_texts_go_on_from_one_cache_in_turn(model) -> None:
    """Neither sees the keys of the other, nor does the cache before them, windows later."""
    begin, texts = TEXT[:700], (TEXT[700:1900], TEXT[900:2100])
    first = model(encode(begin), use_cache=True).past_key_values
    caches, found = [first, first], [[], []]
    for start, stop in ((0, 300), (300, 310), (310, 311), (311, 900), (900, 1200)):
        for i, text in enumerate(texts):
            piece = encode(text[start:stop])
            output = model(piece, past_key_values=caches[i], use_cache=True)
            caches[i] = output.past_key_values
            found[i].append(output.logits)
    again = model(encode(texts[0]), past_key_values=first, use_cache=True).logits
    for text, parts in zip(texts, (torch.cat(found[0], 1), torch.cat(found[1], 1)), strict=True):
        expected = model(encode(begin + text), use_cache=False).logits[:, len(begin) :]
        torch.testing.assert_close(parts, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(again, torch.cat(found[0], 1), rtol=1e-10, atol=1e-10)


def test_inference_mode_may_begin_or_end_between_calls(model) -> None:
    ids = encode(TEXT[:1500])
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    with torch.inference_mode():
        cache = model(ids[:, :500], use_cache=True).past_key_values
    with torch.no_grad():
        output = model(ids[:, 500:1000], past_key_values=cache, use_cache=True)
        torch.testing.assert_close(output.logits, expected[:, 500:1000], rtol=1e-10, atol=1e-10)
    with torch.inference_mode():
        found = model(ids[:, 1000:], past_key_values=output.past_key_values).logits
        torch.testing.assert_close(found, expected[:, 1000:], rtol=1e-10, atol=1e-10)
        made_inside = build_byte_model("unimatrix", automaton_window=W)
        assert made_inside(ids, use_cache=True).logits.isfinite().all()


@torch.no_grad()
def test_keys_of_other_weights_are_not_used(model) -> None:
    ids = encode(TEXT[:1600])
    cache = model(ids[:, :800], use_cache=True).past_key_values
    other = copy.deepcopy(model)
    for weight in other.parameters():
        weight.mul_(1.3)
    index = cache.shared["indexed_attention"]
    with count_made(other) as made:
        found = other(ids[:, 800:], past_key_values=cache.forget_weights(), use_cache=True)
    assert list_made(made) == [W + 800]
    assert torch.isfinite(found.logits).all()
    # The same weights changed in place, the embedding alone.
    cache = model(ids[:, :800], use_cache=True).past_key_values
    model.model.embed_tokens.weight.mul_(1.1)
    with count_made(model) as made:
        model(ids[:, 800:], past_key_values=cache, use_cache=True)
    assert list_made(made) == [W + 800]
    assert index.tokens.shape == (1, W)


def test_a_gradient_goes_through_the_keys(model) -> None:
    ids = encode(TEXT[:800])
    cache = model(ids[:, :400], use_cache=True).past_key_values
    model(ids[:, 400:], past_key_values=cache, use_cache=True).logits.sum().backward()
    assert model.model.block.indexed_attention.key_conv.grad.abs().sum() > 0


@torch.no_grad()
def test_large_streams_keep_none(model, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = encode(TEXT[:1200])
    expected = model(ids, use_cache=False).logits
    monkeypatch.setattr(key_ring, "_MOST_BYTES", 1000)
    with count_made(model) as made:
        found = read(model, ids, [400])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert max(list_made(made)) >= W
    monkeypatch.setattr(key_ring, "MOST_NEW", 300)
    torch.testing.assert_close(read(model, ids, [400]), expected, rtol=1e-10, atol=1e-10)
