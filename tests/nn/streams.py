"""Streams of tokens for tests of one mixer alone, and what every mixer must do with them."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import embedding
from torch.utils._pytree import tree_leaves, tree_map_only

from tests.models import build_model, draw_ids
from unimatrix.nn.mixer import Mixer, Tokens

WIDTH, VOCAB = 12, 23
Result = tuple[Any, Any]


def build_mixer(name: str, variant: str, **changes: Any) -> Any:
    """Return a mixer of a variant in float64, its weights drawn, run by its reference."""
    model = build_model(variant, **changes)
    mixer = next(mixer for mixer in model.model.mixers if mixer.name == name)
    mixer.operator_options = {"backend": "reference"} if mixer.runs_operator else {}
    return mixer


class Stream(NamedTuple):
    """A part of a stream, and what was read before it.

    Attributes:
        ids: [B, T].
        source: [B, T, D], the normalised stream.
        table: [V, D], the embeddings.
        num_before: [B].
        last_ids: [B], -1 for none.
    """

    ids: Tensor
    source: Tensor
    table: Tensor
    num_before: Tensor
    last_ids: Tensor

    def cut(self, first: int, last: int) -> "Stream":
        """Return the tokens from ``first`` to before ``last``, as they follow those before."""
        last_ids = self.ids[:, first - 1] if first else self.last_ids
        parts = self.ids[:, first:last], self.source[:, first:last], self.table
        return Stream(*parts, self.num_before + first, last_ids)

    def select(self, row: int) -> "Stream":
        """Return one row."""
        rows = slice(row, row + 1)
        own = (self.num_before[rows], self.last_ids[rows])
        return Stream(self.ids[rows], self.source[rows], self.table, *own)

    def describe(self, lengths: Tensor | None = None) -> Tokens:
        """Return the tokens as mixers see them."""
        return Tokens(
            ids=self.ids,
            embeddings=embedding(self.ids, self.table),
            embed=lambda ids: embedding(ids, self.table),
            lengths=lengths,
            num_before=self.num_before,
            last_ids=self.last_ids,
            keeps_state=True,
        )

    def read(self, mixer: Mixer, state: Any = None, lengths: Tensor | None = None) -> Result:
        """Return what a mixer reads, and its state."""
        tokens, state = mixer.search(self.describe(lengths), state)
        result: Result = mixer(self.source, tokens, state)
        return result


def draw_stream(batch: int, num_tokens: int, seed: int = 0, width: int = WIDTH) -> Stream:
    """Return a stream of few different tokens, from its start."""
    generator = torch.Generator().manual_seed(seed)
    return Stream(
        ids=draw_ids(batch, num_tokens, seed=seed, high=8),
        source=torch.randn(batch, num_tokens, width, generator=generator, dtype=torch.float64),
        table=torch.randn(VOCAB, width, generator=generator, dtype=torch.float64),
        num_before=torch.zeros(batch, dtype=torch.int64),
        last_ids=torch.full((batch,), -1),
    )


def assert_same(actual: Any, expected: Any) -> None:
    """Assert that named tuples of tensors hold the same, but for rounding."""
    ours, theirs = tree_leaves(actual), tree_leaves(expected)
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def check_split(mixer: Mixer, *, compares_states: bool = True) -> None:
    """Assert that a stream read in two parts is the stream read at once, whatever the split."""
    stream, following = draw_stream(2, 16), draw_stream(2, 5, seed=7)
    whole, state = stream.read(mixer)
    following = following._replace(num_before=stream.num_before + 16, last_ids=stream.ids[:, -1])
    for split in (1, 6, 15):
        first, carried = stream.cut(0, split).read(mixer)
        second, last = stream.cut(split, 16).read(mixer, carried)
        joined = [
            torch.cat(pair, dim=1)
            for pair in zip(tree_leaves(first), tree_leaves(second), strict=True)
            if pair[0] is not None
        ]
        assert_same(joined, [leaf for leaf in tree_leaves(whole) if leaf is not None])
        if compares_states:
            assert_same(last, state)
        assert_same(following.read(mixer, last)[0], following.read(mixer, state)[0])


def check_padding(mixer: Mixer, *, compares_states: bool = True) -> None:
    """Assert that padding neither is carried nor changes what real tokens read."""
    before, stream, following = (draw_stream(3, n, seed=n) for n in (4, 6, 3))
    _, warm = before.read(mixer)
    counts = before.num_before + 4
    stream = stream._replace(num_before=counts, last_ids=before.ids[:, -1])
    lengths = torch.tensor([6, 2, 0])
    padded, state = stream.read(mixer, warm, lengths)
    is_padding = torch.arange(6) >= lengths.unsqueeze(1)
    other = stream._replace(
        ids=torch.where(is_padding, 1, stream.ids),
        source=torch.where(is_padding.unsqueeze(-1), 5.0, stream.source),
    )
    _, state_of_other = other.read(mixer, warm, lengths)
    last_ids = torch.stack([stream.ids[0, 5], stream.ids[1, 1], before.ids[2, 3]])
    following = following._replace(num_before=counts + lengths, last_ids=last_ids)
    expected_next, _ = following.read(mixer, state)
    assert_same(following.read(mixer, state_of_other)[0], expected_next)
    for row, length in enumerate(lengths.tolist()):
        carried = select_row(warm, row)
        if length:
            read, carried = stream.select(row).cut(0, length).read(mixer, carried)
            real = tree_map_only(Tensor, lambda part, b=row, n=length: part[b : b + 1, :n], padded)
            assert_same(real, read)
        if compares_states:
            assert_same(select_row(state, row), carried)
        continued, _ = following.select(row).read(mixer, carried)
        assert_same(select_row(expected_next, row), continued)


def select_row(parts: Any, row: int) -> Any:
    """Return one row of named tuples of tensors."""
    return tree_map_only(Tensor, lambda tensor: tensor[row : row + 1], parts)


def check_gradients(mixer: Mixer, *, beside: tuple[str, ...]) -> None:
    """Assert that gradients are those of finite differences, through a state that is carried.

    Args:
        mixer: in float64.
        beside: layers that ``forward`` does not call; all others get a gradient.
    """
    stream = draw_stream(2, 6)
    weights = {
        name: weight
        for name, weight in mixer.named_parameters()
        if weight.requires_grad and name.split(".")[0] not in beside
    }

    def read(source: Tensor, table: Tensor, *given: Tensor) -> list[Tensor]:
        own = dict(zip(weights, given, strict=True))
        parts, state = [], None
        for first, last in ((0, 4), (4, 6)):
            part = stream._replace(source=source, table=table).cut(first, last)
            tokens, state = mixer.search(part.describe(), state)
            called = functional_call(mixer, own, (part.source, tokens, state))
            parts.append(called[0].context)
            state = called[1]
        carried = [leaf for leaf in tree_leaves(state) if isinstance(leaf, Tensor)]
        return [*parts, *(tensor for tensor in carried if tensor.requires_grad)]

    drawn = (stream.source, stream.table, *weights.values())
    leaves = [tensor.detach().clone().requires_grad_() for tensor in drawn]
    assert torch.autograd.gradcheck(read, leaves, fast_mode=True)
    total = torch.stack([part.square().sum() for part in read(*leaves)]).sum()
    grads = torch.autograd.grad(total, leaves[2:])
    for name, grad in zip(weights, grads, strict=True):
        assert grad.abs().sum() > 0, name
