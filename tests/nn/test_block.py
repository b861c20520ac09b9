"""The block (E11, E12, E22, E23): against the sum of its parts."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.models import VARIANTS, build_model
from tests.nn.streams import Stream, assert_same, draw_stream
from unimatrix.nn.block import States, UniMatrixBlock
from unimatrix.nn.mixer import Read, Tokens, Votes
from unimatrix.nn.slot_mixer import SlotMixer

variants = pytest.mark.parametrize("variant", VARIANTS)
EACH_MIXER = ("core+conv", "assoc", "sparsepointer", "sparsepointer+hidden", "selective")
each_mixer = pytest.mark.parametrize("variant", EACH_MIXER)


def build(variant: str, **changes: Any) -> UniMatrixBlock:
    model = build_model(variant, **changes)
    model.set_backend("reference")
    block: UniMatrixBlock = model.model.block
    return block


def describe(block: UniMatrixBlock, stream: Stream, lengths: Tensor | None = None) -> Tokens:
    """Return the tokens, with what mixers read before that read once, and factors of E12."""
    tokens = stream.describe(lengths)
    generator = torch.Generator().manual_seed(3)
    reads = {}
    for name in block.gates:
        mixer = getattr(block, name, None)
        if mixer is None or mixer.reads_at is not None:
            drawn = torch.randn(*stream.source.shape, generator=generator, dtype=torch.float64)
            reads[name] = Read(drawn)
            if isinstance(mixer, SlotMixer):
                reads[name], _ = mixer(stream.source, tokens, None)
    return tokens._replace(reads=reads, modulation=1 + tokens.embeddings.sigmoid())


def open_gate(layer: nn.Linear, h: Tensor) -> Tensor:
    return 1 / (1 + (-h @ layer.weight.T - layer.bias).exp())


def apply_by_hand(
    block: UniMatrixBlock, x: Tensor, tokens: Tokens, carry: States
) -> tuple[Tensor, States, Votes | None]:
    """Return what ``forward`` returns, part by part."""
    h, reads, states, votes = block.norm(x), dict(tokens.reads), {}, None
    gates = {"residual_context": block.context_gate}
    for name in (
        "matrix_mixer",
        "slot_mixer",
        "dense_mixer",
        "selective_mixer",
        "indexed_attention",
    ):
        mixer = getattr(block, name)
        if mixer is None:
            continue
        gates[name] = mixer.residual_gate if name == "matrix_mixer" else mixer.read_gate
        if mixer.reads_at is None:
            reads[name], states[name] = mixer(h, tokens, carry.get(name))
    for name, read in reads.items():
        x = x + open_gate(gates[name], h) * read.context
    has_pointer = block.slot_mixer is not None and block.slot_mixer.pointer_gate is not None
    if tokens.is_last and has_pointer:
        read = reads["slot_mixer"]
        share = open_gate(block.slot_mixer.pointer_gate, h)
        votes = (read.pointer_token_ids, share * read.pointer_weights)
    x = x + block.feed_forward(block.ffn_norm(x))
    return x * tokens.modulation, states, votes


@variants
@torch.no_grad()
def test_equals_the_sum_of_its_parts(variant: str) -> None:
    block, stream = build(variant), draw_stream(2, 9)
    tokens, x, carry = describe(block, stream), stream.source, {}
    for is_last in (False, True):  # the second goes on with what the first carried
        tokens = tokens._replace(is_last=is_last)
        expected = apply_by_hand(block, x, tokens, carry)
        x, carry, votes = block(x, tokens, carry)
        assert_same((x, carry, votes), expected)
    assert set(carry) == {mixer.name for mixer in block.mixers if mixer.reads_at is None}


@each_mixer
@torch.no_grad()
def test_two_parts_equal_one(variant: str) -> None:
    block, stream = build(variant), draw_stream(2, 9)
    tokens = describe(block, stream)
    whole, states, _ = block(stream.source, tokens, {})
    parts, carry = [], {}
    for first, last in ((0, 4), (4, 9)):
        own = stream.cut(first, last)
        reads = {
            name: type(read)(*(part[:, first:last] for part in read))
            for name, read in tokens.reads.items()
        }
        factors = tokens.modulation[:, first:last]
        given = own.describe()._replace(reads=reads, modulation=factors)
        x, carry, _ = block(own.source, given, carry)
        parts.append(x)
    assert_same((torch.cat(parts, dim=1), carry), (whole, states))


@each_mixer
@torch.no_grad()
def test_padding_is_nothing(variant: str) -> None:
    block, stream = build(variant), draw_stream(2, 9)
    lengths = torch.tensor([9, 5])
    tokens = describe(block, stream, lengths)
    x, carry, _ = block(stream.source, tokens, {})
    is_real = (torch.arange(9) < lengths.unsqueeze(1)).unsqueeze(-1)
    other, states, _ = block(torch.where(is_real, stream.source, 3.0), tokens, {})
    assert torch.equal(torch.where(is_real, other, 0.0), torch.where(is_real, x, 0.0))
    for name, state in states.items():
        if name != "dense_mixer":  # its columns of padding are marked as holding nothing
            assert_same(state, carry[name])


@pytest.mark.parametrize(
    ("variant", "silent"),
    [
        ("core", {"matrix_mixer.diag_proj"}),  # frozen: no rule uses it
        ("rosa-assoc", {"matrix_mixer.diag_proj"}),
        ("discovery+automaton", set()),
        # These act where the slots are read: before.
        (
            "selective",
            {f"selective_mixer.{name}" for name in ("gate_up", "gate_down", "value_proj")},
        ),
    ],
)
def test_every_parameter_learns(variant: str, silent: set[str]) -> None:
    block, stream = build(variant), draw_stream(2, 9)
    x, _, _ = block(stream.source, describe(block, stream), {})
    x.square().sum().backward()
    without = {
        name.removesuffix(".weight")
        for name, weight in block.named_parameters()
        if name.endswith(".weight") and (weight.grad is None or not weight.grad.any())
    }
    assert without == silent


@torch.no_grad()
def test_a_mixer_that_has_not_read_yet_adds_nothing() -> None:
    """Before the first depth step, selective slots whose gate sees the stream have read nothing."""
    block, stream = build("selective+hidden"), draw_stream(2, 9)
    tokens = describe(block, stream)
    reads = dict(tokens.reads)
    read = reads.pop("selective_mixer")
    without, _, _ = block(stream.source, tokens._replace(reads=reads), {})
    nothing = Read(torch.zeros_like(read.context))
    expected, _, _ = block(
        stream.source, tokens._replace(reads={**reads, "selective_mixer": nothing}), {}
    )
    torch.testing.assert_close(without, expected)
    assert not torch.allclose(without, block(stream.source, tokens, {})[0])


@torch.no_grad()
def test_a_block_without_mixers_feeds_forward() -> None:
    block, stream = build("core", update_rules="none"), draw_stream(2, 9)
    assert block.mixers == []
    assert block.gates == {}
    x, states, votes = block(stream.source, stream.describe(), {})
    assert (states, votes) == ({}, None)
    expected = stream.source + block.feed_forward(block.ffn_norm(stream.source))
    torch.testing.assert_close(x, expected)


def test_what_is_added_to_the_stream_is_dropped_in_training_alone() -> None:
    block, stream = build("core", dropout=0.5), draw_stream(2, 9)
    tokens = stream.describe()
    expected, _, _ = block.eval()(stream.source, tokens, {})
    block.train()
    block.feed_forward.eval()
    torch.manual_seed(0)
    x, _, _ = block(stream.source, tokens, {})
    assert not torch.allclose(x, expected)
    torch.manual_seed(0)
    h = block.norm(stream.source)
    read, _ = block.matrix_mixer(h, tokens, None)
    by_hand = stream.source + block.dropout(block.matrix_mixer.residual_gate(h).sigmoid() * read[0])
    by_hand = by_hand + block.dropout(block.feed_forward(block.ffn_norm(by_hand)))
    torch.testing.assert_close(x, by_hand)
