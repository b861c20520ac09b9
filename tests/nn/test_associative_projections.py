"""What slots and dense associative memory share: sources, projections, gate; product keys (E20)."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cosine_similarity

from tests.models import SMALL
from tests.nn.streams import WIDTH, draw_stream
from unimatrix.configuration import UniMatrixConfig
from unimatrix.nn.associative_projections import AssociativeProjections, ProductKeys
from unimatrix.nn.dense_mixer import DenseMixer
from unimatrix.nn.slot_mixer import SlotMixer

KINDS: dict[str, type[AssociativeProjections]] = {"slots": SlotMixer, "dense": DenseMixer}


def build(memory: str, **changes: Any) -> AssociativeProjections:
    config = UniMatrixConfig(**(SMALL | {"associative_memory": memory} | changes))
    return KINDS[memory](config).double()


@pytest.mark.parametrize("memory", KINDS)
def test_projections_are_there_where_they_are_learned(memory: str) -> None:
    learned = build(memory, slot_key_size=7)
    shapes = {name: tuple(weight.shape) for name, weight in learned.named_parameters()}
    assert shapes["query_proj.weight"] == shapes["key_proj.weight"] == (7, WIDTH)
    assert shapes["value_proj.weight"] == (WIDTH, WIDTH)
    assert "query_proj.bias" not in shapes
    plain = build(memory, identity_lookup=True, identity_values=True)
    layers = (plain.query_proj, plain.key_proj, plain.value_proj)
    assert all(type(layer) is nn.Identity for layer in layers)
    assert plain.gate is plain.read_gate
    assert plain.gate.weight.shape == (WIDTH, WIDTH)


@pytest.mark.parametrize("memory", KINDS)
@torch.no_grad()
def test_the_source_is_the_stream_of_every_step_or_the_token_once(memory: str) -> None:
    stream = draw_stream(2, 9)
    other = stream._replace(source=stream.source + 1)
    hidden, by_token = build(memory), build(memory, slot_source="token")
    assert (hidden.reads_at, by_token.reads_at) == (None, 0)
    contexts = [part.read(hidden)[0].context for part in (stream, other)]
    assert not torch.allclose(*contexts)
    contexts = [part.read(by_token)[0].context for part in (stream, other)]
    assert torch.equal(*contexts)
    other = stream._replace(table=stream.table + torch.linspace(0, 1, WIDTH))
    contexts = [part.read(by_token)[0].context for part in (stream, other)]
    assert not torch.allclose(*contexts)


@pytest.mark.parametrize("memory", KINDS)
@torch.no_grad()
def test_the_key_is_that_of_the_token_before(memory: str) -> None:
    """What is found beside a pair's key is the value of the token that came after it."""
    options = {"identity_lookup": True, "identity_values": True, "slots_per_read": 1}
    mixer = build(memory, **options, write_gate=False, num_slots=9)
    stream = draw_stream(1, 6)
    stream.source[0, 5] = stream.source[0, 2]
    read, state = stream.read(mixer)
    torch.testing.assert_close(read.context[0, 5], stream.source[0, 3])
    torch.testing.assert_close(state.previous[0], stream.source[0, 5])
    # Also where the token before was read by an earlier call.
    _, state = stream.cut(0, 3).read(mixer)
    read, _ = stream.cut(3, 6).read(mixer, state)
    torch.testing.assert_close(read.context[0, 2], stream.source[0, 3])


def test_each_half_becomes_its_nearest_entry() -> None:
    product_keys = ProductKeys(6, 4).double()
    keys = torch.randn(2, 5, 6, dtype=torch.float64)
    quantised = product_keys(keys)
    for b, t, half in [(b, t, half) for b in range(2) for t in range(5) for half in range(2)]:
        part = slice(3 * half, 3 * half + 3)
        table = product_keys.codebooks[half].weight
        cosines = [cosine_similarity(keys[b, t, part], entry, dim=0).item() for entry in table]
        nearest = table[cosines.index(max(cosines))]
        torch.testing.assert_close(quantised[b, t, part], nearest / nearest.norm())


def test_equal_codes_give_equal_keys() -> None:
    product_keys = ProductKeys(4, 2)
    keys = torch.randn(1, 50, 4)
    assert len(product_keys(keys)[0].detach().unique(dim=0)) <= 4


def test_keys_and_codebooks_learn() -> None:
    product_keys = ProductKeys(6, 4)
    keys = torch.randn(1, 5, 6, requires_grad=True)
    (product_keys(keys) * torch.randn(6)).sum().backward()
    for tensor in (keys, *(codebook.weight for codebook in product_keys.codebooks)):
        assert tensor.grad.abs().sum() > 0


def test_gradients_are_those_of_a_softmax_over_the_cosines() -> None:
    """The key is the nearest entry; its gradient is that of the mean of all, by their cosines."""
    product_keys, keys = ProductKeys(6, 4).double(), torch.randn(2, 5, 6, dtype=torch.float64)
    weigh = torch.randn(2, 5, 6, dtype=torch.float64)
    leaves = [keys.requires_grad_(), *product_keys.parameters()]
    found = torch.autograd.grad((product_keys(keys) * weigh).sum(), leaves)
    soft = []
    for half in range(2):
        table = product_keys.codebooks[half].weight
        codes = table / table.norm(dim=-1, keepdim=True)
        part = keys[..., 3 * half : 3 * half + 3]
        cosines = (part / part.norm(dim=-1, keepdim=True)) @ codes.T
        soft.append(cosines.softmax(dim=-1) @ codes)
    expected = torch.autograd.grad((torch.cat(soft, dim=-1) * weigh).sum(), leaves)
    torch.testing.assert_close(found, expected)
