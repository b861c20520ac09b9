"""The dense associative memory with its projections (E5): against a loop over pairs."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from tests.nn.streams import build_mixer, check_gradients, check_padding, check_split, draw_stream
from unimatrix.nn.dense_mixer import DenseMixer, DenseState
from unimatrix.nn.mixer import Read

variants = pytest.mark.parametrize("variant", ["assoc", "assoc+token", "assoc-hard"])


def build(variant: str) -> DenseMixer:
    mixer: DenseMixer = build_mixer("dense_mixer", variant)
    return mixer


def read_by_hand(mixer: DenseMixer, source: Tensor) -> Tensor:
    """Return what one row [T, D] of source features reads."""
    contexts = [torch.zeros(source.shape[1], dtype=torch.float64)]
    for t in range(1, len(source)):
        query, scores = mixer.query_proj(source[t]), []
        for i in range(1, t):  # the token before i, and i
            cosine = cosine_similarity(query, mixer.key_proj(source[i - 1]), dim=0)
            scores.append(cosine / math.sqrt(len(query)))
        best = sorted(range(len(scores)), key=lambda i: -scores[i].item())[: mixer.topk]
        if not best:
            contexts.append(torch.zeros_like(contexts[0]))
            continue
        weights = (8 * torch.stack([scores[i] for i in best])).softmax(-1)
        values = [mixer.value_proj(source[i + 1]) for i in best]
        contexts.append(sum(w * value for w, value in zip(weights, values, strict=True)))
    return torch.stack(contexts)


@variants
@torch.no_grad()
def test_equals_a_loop(variant: str) -> None:
    mixer, stream = build(variant), draw_stream(2, 11)
    read, state = stream.read(mixer)
    assert isinstance(read, Read)
    assert isinstance(state, DenseState)
    features = stream.source if mixer.reads_at is None else stream.describe().embeddings
    for row in range(2):
        torch.testing.assert_close(read.context[row], read_by_hand(mixer, features[row]))
    torch.testing.assert_close(state.previous, features[:, -1])
    # The first token has no predecessor.
    assert state.dense.valid.tolist() == 2 * [[False] + 10 * [True]]


@variants
@torch.no_grad()
def test_two_parts_equal_one_and_padding_is_nothing(variant: str) -> None:
    check_split(build(variant))
    # Columns of padding are carried, marked as holding nothing.
    check_padding(build(variant), compares_states=False)


def test_gradients() -> None:
    check_gradients(build("assoc"), beside=("read_gate",))


def test_one_pair_read_has_a_weight_of_one_and_teaches_no_key() -> None:
    """With K = 1 the softmax is constant: values learn, queries and keys do not."""
    mixer, stream = build("assoc-hard"), draw_stream(2, 11)
    assert mixer.topk == 1
    stream.read(mixer)[0].context.square().sum().backward()
    assert mixer.value_proj.weight.grad.abs().sum() > 0
    assert not mixer.query_proj.weight.grad.any()
    assert not mixer.key_proj.weight.grad.any()


def test_it_says_that_it_grows() -> None:
    assert build("assoc").grows
