"""The slots with their projections and gates (E6 to E9, E20, E21): against a loop over slots."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from tests.nn.streams import build_mixer, check_gradients, check_padding, check_split, draw_stream
from unimatrix.nn.slot_mixer import SlotMixer, SlotMixerState

# Of the token and of the stream, with product keys and two hops, without a gate.
VARIANTS = (
    "sparsepointer",
    "sparsepointer+hidden",
    "sparsepointer+two-hops",
    "sparsepointer+automaton",
)
variants = pytest.mark.parametrize("variant", VARIANTS)


def build(variant: str) -> SlotMixer:
    mixer: SlotMixer = build_mixer("slot_mixer", variant, num_slots=4, slots_per_read=3)
    # So that some writes overwrite what they match, and others the oldest.
    mixer.match_threshold = 0.9
    return mixer


class Slot:
    """What one slot holds."""

    def __init__(self) -> None:
        self.key, self.value = torch.zeros(1), torch.zeros(1)
        self.strength, self.age, self.token_id = torch.zeros(()), 0, 0


def read_slots(mixer: SlotMixer, slots: list[Slot], query: Tensor) -> tuple[Tensor, dict]:
    """Return the context that a query reads and the weight of every token id read."""
    filled = [slot for slot in slots if slot.strength > mixer.strength_floor]
    if not filled:
        return torch.zeros(mixer.value_size, dtype=torch.float64), {}
    scores = []
    for slot in filled:
        cosine = cosine_similarity(query, slot.key, dim=0)
        scores.append(cosine / math.sqrt(len(query)) + slot.strength.clamp_min(1e-4).log())
    best = sorted(range(len(filled)), key=lambda m: -scores[m].item())[: mixer.slots_per_read]
    weights = (8 * torch.stack([scores[m] for m in best])).softmax(-1)
    context = sum(w * filled[m].value for w, m in zip(weights, best, strict=True))
    votes: dict[int, float] = {}
    for w, m in zip(weights.tolist(), best, strict=True):
        votes[filled[m].token_id] = votes.get(filled[m].token_id, 0) + w
    return context, votes


def choose(mixer: SlotMixer, slots: list[Slot], key: Tensor) -> Slot:
    """Return the slot that is written; all that are filled grow older."""
    filled = [slot for slot in slots if slot.strength > mixer.strength_floor]
    for slot in filled:
        slot.age += 1
    cosines = [cosine_similarity(key, slot.key, dim=0).item() for slot in filled]
    if cosines and max(cosines) > mixer.match_threshold:
        return filled[cosines.index(max(cosines))]
    if len(filled) < len(slots):
        return next(slot for slot in slots if slot not in filled)
    return max(slots, key=lambda slot: slot.age)


def read_by_hand(mixer: SlotMixer, source: Tensor, ids: list[int]) -> tuple[Tensor, list, list]:
    """Return the contexts and votes of one row, and its slots at the end."""
    slots, contexts, votes = [Slot() for _ in range(mixer.num_slots)], [], []
    for t, s in enumerate(source):
        query = mixer.query_proj(s)
        context, voted = read_slots(mixer, slots, query)
        for hop in mixer.hop_projs:
            query = query + hop(context)
            context, voted = read_slots(mixer, slots, query)
        contexts.append(context)
        votes.append(voted)
        if t == 0:
            continue
        key = mixer.key_proj(source[t - 1])
        if mixer.product_keys is not None:
            key = mixer.product_keys(key)
        slot = choose(mixer, slots, key)
        slot.key, slot.value, slot.token_id, slot.age = key, mixer.value_proj(s), ids[t], 0
        slot.strength = torch.ones(())
        if mixer.write_gate is not None:
            slot.strength = torch.sigmoid(mixer.write_gate(torch.cat([source[t - 1], s])))[0]
    return torch.stack(contexts), votes, slots


def sum_votes(ids: Tensor, weights: Tensor) -> dict[int, float]:
    """Return the weight of every token id."""
    votes: dict[int, float] = {}
    for token_id, weight in zip(ids.tolist(), weights.tolist(), strict=True):
        if weight:
            votes[token_id] = votes.get(token_id, 0) + weight
    return votes


@variants
@torch.no_grad()
def test_equals_a_loop(variant: str) -> None:
    mixer, stream = build(variant), draw_stream(2, 14)
    read, state = stream.read(mixer)
    assert isinstance(state, SlotMixerState)
    features = stream.source if mixer.reads_at is None else stream.describe().embeddings
    for row in range(2):
        contexts, votes, slots = read_by_hand(mixer, features[row], stream.ids[row].tolist())
        torch.testing.assert_close(read.context[row], contexts)
        for t, expected in enumerate(votes):
            found = sum_votes(read.pointer_token_ids[row, t], read.pointer_weights[row, t])
            assert found == pytest.approx(expected)
        held = zip(state.slots.slot_token_ids[row], state.slots.slot_age[row], strict=True)
        assert [(int(i), int(age)) for i, age in held] == [(s.token_id, s.age) for s in slots]
        strengths = torch.stack([slot.strength.double() for slot in slots])
        torch.testing.assert_close(state.slots.slot_strength[row], strengths)
    torch.testing.assert_close(state.previous, features[:, -1])


@variants
@torch.no_grad()
def test_two_parts_equal_one_and_padding_is_nothing(variant: str) -> None:
    check_split(build(variant))
    check_padding(build(variant))


@pytest.mark.parametrize("variant", [VARIANTS[0], VARIANTS[1]])
def test_gradients(variant: str) -> None:
    check_gradients(build(variant), beside=("read_gate", "pointer_gate"))


def test_every_hop_and_codebook_learns() -> None:
    """Product keys have the gradient of a softmax: no finite difference shows it."""
    mixer, stream = build("sparsepointer+two-hops"), draw_stream(2, 14)
    read, _ = stream.read(mixer)
    read.context.square().sum().backward()
    layers = (*mixer.hop_projs, *mixer.product_keys.codebooks, mixer.query_proj, mixer.key_proj)
    for layer in layers:
        assert layer.weight.grad.abs().sum() > 0


def test_votes_are_the_weights_read_behind_a_gate_of_the_stream() -> None:
    mixer, stream = build("sparsepointer"), draw_stream(2, 14)
    read, _ = stream.read(mixer)
    ids, weights = mixer.vote(stream.source, read)
    assert torch.equal(ids, read.pointer_token_ids)
    for row, t in ((0, 0), (0, 13), (1, 7)):
        layer, h = mixer.pointer_gate, stream.source[row, t]
        share = 1 / (1 + math.exp(-(layer.weight[0] @ h + layer.bias[0]).item()))
        torch.testing.assert_close(weights[row, t], share * read.pointer_weights[row, t])
    weights.sum().backward()
    assert mixer.pointer_gate.weight.grad.abs().sum() > 0
    silent = build_mixer("slot_mixer", "sparsepointer", pointer=False)
    assert (mixer.votes, silent.votes) == (True, False)
