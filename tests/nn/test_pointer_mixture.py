"""The pointer mixture against the sum of probabilities that it stands for."""

import math
from typing import Any

import pytest
import torch

from tests.models import build_model
from tests.ops.oracle import compare_with_reference
from unimatrix.kernels.plan import _weigh_retrieved
from unimatrix.nn.indexed_attention import IndexedRead
from unimatrix.nn.pointer_mixture import MixedLogits, PointerMixture, mix_logits, score_targets
from unimatrix.nn.residual_context import ResidualRead
from unimatrix.nn.selective_mixer import SelectiveRead


def draw(seed=0, vocab=7, num_pointers=4):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 5, vocab, generator=generator, dtype=torch.float64)
    ids = torch.randint(0, vocab, (3, 5, num_pointers), generator=generator)
    ids[0, :, 1] = ids[0, :, 0]  # proposed twice
    scores = torch.randn(3, 5, 1 + num_pointers, generator=generator, dtype=torch.float64)
    scores[1, :, 2] = -torch.inf  # not found
    scores[2, :2, 1:] = -torch.inf  # nothing found
    return logits.requires_grad_(), ids, scores.requires_grad_()


def sum_up(logits, ids, log_weights):
    """Return the probabilities, summed densely."""
    weights = log_weights.exp()
    dense = torch.zeros_like(logits).scatter_add(-1, ids, weights[..., 1:])
    return weights[..., :1] * logits.softmax(-1) + dense


def test_the_mixture_is_the_sum_of_its_parts() -> None:
    logits, ids, scores = draw()
    log_weights = scores.log_softmax(-1)
    mixed = mix_logits(MixedLogits(logits, ids, log_weights))
    assert torch.allclose(mixed.exp(), sum_up(logits, ids, log_weights), atol=1e-14)
    assert torch.allclose(mixed.exp().sum(-1), torch.ones(3, 5, dtype=torch.float64))


def test_targets_are_scored_as_the_mixture_scores_them() -> None:
    logits, ids, scores = draw(1)
    parts = MixedLogits(logits, ids, scores.log_softmax(-1))
    for target in range(7):
        targets = torch.full((3, 5), target)
        expected = -mix_logits(parts).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        assert torch.allclose(score_targets(parts, targets), expected, atol=1e-12)


def test_gradients_are_those_of_the_sum() -> None:
    generator = torch.Generator().manual_seed(3)
    weigh = torch.randn(3, 5, 7, generator=generator, dtype=torch.float64)
    grads = []
    for function in (
        lambda *parts: mix_logits(MixedLogits(*parts)),
        lambda *parts: sum_up(*parts).log(),
    ):
        logits, ids, scores = draw(2)
        (function(logits, ids, scores.log_softmax(-1)) * weigh).sum().backward()
        grads.append((logits.grad, scores.grad))
    for ours, theirs in zip(*grads, strict=True):
        assert torch.isfinite(ours).all()
        assert torch.allclose(ours, theirs, atol=1e-12)


def test_a_certain_pointer_and_a_hopeless_vocabulary_stay_finite() -> None:
    logits = torch.tensor([[0.0, -2000.0, 0.0]], requires_grad=True)
    log_weights = torch.tensor([[-100.0, 0.0]], requires_grad=True)
    parts = MixedLogits(logits, torch.tensor([[1]]), log_weights)
    loss = score_targets(parts, torch.tensor([1])).sum() + mix_logits(parts)[0, 1]
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()
    assert torch.isfinite(log_weights.grad).all()


def draw_found(num_tokens: int, num_reads: int, generator):
    """Return what slots and automaton found, each of them sometimes nothing."""
    shape = (2, num_tokens, num_reads)
    log_strength = torch.randn(shape, generator=generator, dtype=torch.float64)
    log_strength[:, ::3] = -torch.inf
    slot_ids = torch.randint(0, 9, shape, generator=generator)
    lengths = torch.randint(0, 3000, shape[:2], generator=generator)
    lengths[:, :40] = torch.arange(40)[:num_tokens]
    predicted = torch.randint(0, 9, shape[:2], generator=generator).masked_fill(lengths == 0, -1)
    return log_strength, slot_ids, (predicted, lengths)


def gather(found: SelectiveRead | None, match: ResidualRead | None) -> dict[str, Any]:
    """Return reads by the mixer's name."""
    return {"selective_mixer": found, "residual_context": match}


def build_mixture(num_reads: int, matches: bool, width: int) -> PointerMixture:
    """Return a mixture of so many reads and perhaps an automaton's token."""
    config = build_model("selective").config
    config.hidden_size, config.automaton_pointer = width, matches
    return PointerMixture(config, num_reads)


SOURCES = pytest.mark.parametrize(
    ("num_reads", "matches"), [(0, True), (3, True), (2, False)], ids=str
)


@SOURCES
@torch.no_grad()
def test_shares_are_those_of_one_softmax(num_reads: int, matches: bool) -> None:
    """Against a loop over positions: the vocabulary has the score 0."""
    mixture, generator = build_mixture(num_reads, matches, 6).double(), torch.Generator()
    for weight in mixture.parameters():
        weight.copy_(torch.randn(weight.shape, generator=generator.manual_seed(weight.numel())))
    log_strength, slot_ids, (predicted, lengths) = draw_found(50, num_reads, generator)
    h = torch.randn(2, 50, 6, dtype=torch.float64)
    found = SelectiveRead(h, slot_ids, log_strength, None, None) if num_reads else None
    ids, log_weights = mixture(h, gather(found, ResidualRead(h, predicted, lengths)))
    for row, t in [(row, t) for row in range(2) for t in range(50)]:
        scores, expected_ids = [0.0], []
        if num_reads:
            layer = mixture.slot_score
            of_slots = layer.weight @ h[row, t] + layer.bias + log_strength[row, t]
            scores += of_slots.tolist()
            expected_ids += slot_ids[row, t].tolist()
        if matches:
            layer, length = mixture.automaton_score, int(lengths[row, t])
            of_match = (layer.weight[0] @ h[row, t] + layer.bias[0]).item()
            # 1, 2, 3 to 4, 5 to 8, ..., and all from 257 on
            bucket = min((max(length, 1) - 1).bit_length(), 9)
            of_match += mixture.length_score.weight[bucket, 0].item()
            scores.append(of_match if predicted[row, t] >= 0 else -math.inf)
            expected_ids.append(max(int(predicted[row, t]), 0))
        total = sum(map(math.exp, scores))
        shares = [math.exp(score) / total for score in scores]
        assert log_weights[row, t].exp().tolist() == pytest.approx(shares)
        assert ids[row, t].tolist() == expected_ids


@SOURCES
def test_gradients_of_the_shares(num_reads: int, matches: bool) -> None:
    mixture, generator = build_mixture(num_reads, matches, 4).double(), torch.Generator()
    log_strength, slot_ids, match = draw_found(6, num_reads, generator.manual_seed(1))
    log_strength = log_strength.clamp_min(-9)  # -inf has no finite difference
    match = ((match[0].abs(), match[1])) if matches else (None, None)
    h = torch.randn(2, 6, 4, dtype=torch.float64)

    def weigh(h: torch.Tensor, log_strength: torch.Tensor, elsewhere: torch.Tensor, *weights):
        read = SelectiveRead(h, slot_ids, log_strength, elsewhere, None) if num_reads else None
        own = dict(zip(dict(mixture.named_parameters()), weights, strict=True))
        reads = gather(read, ResidualRead(h, *match))
        return torch.func.functional_call(mixture, own, (h, reads))[1]

    drawn = (h, log_strength, 0 * log_strength, *mixture.parameters())
    leaves = [tensor.detach().clone().requires_grad_() for tensor in drawn]
    assert torch.autograd.gradcheck(weigh, leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("width", [16, 27])
@SOURCES
@pytest.mark.parametrize("learns", [False, True])
def test_one_pass_is_what_the_module_does(num_reads, matches, learns, width, dtype) -> None:
    """With slots, an automaton or both; what was not found has a share of zero."""
    mixture = build_mixture(num_reads, matches, width).to(dtype)
    generator = torch.Generator().manual_seed(0)
    log_strength, slot_ids, match = draw_found(50, num_reads, generator)

    class Planned(torch.nn.Module):
        """Runs the mixture as the plan does."""

        def __init__(self) -> None:
            super().__init__()
            self.mixture = mixture

        def forward(self, *given):
            return _weigh_retrieved(self.mixture, *given)

    planned = Planned()

    def run(backend: str, h, log_strength, elsewhere, **weights) -> dict[str, torch.Tensor]:
        module, prefix = (mixture, "") if backend == "reference" else (planned, "mixture.")
        by_name = {f"{prefix}{name.replace('__', '.')}": w for name, w in weights.items()}
        read = SelectiveRead(h, slot_ids, log_strength, elsewhere, None) if num_reads else None
        given = (h, gather(read, ResidualRead(h, *match) if matches else None))
        ids, log_weights = torch.func.functional_call(module, by_name, given)
        # A share of zero has no finite logarithm to be compared.
        found = {"ids": ids, "h": h, "log_weights": log_weights.clamp_min(-1e3)}
        return found | {"none": log_weights.isneginf()}

    leaves = {
        "h": torch.randn(2, 50, width, generator=generator).to(dtype),
        "log_strength": log_strength.to(dtype),
        "elsewhere": torch.zeros_like(log_strength).to(dtype) if learns else None,
    }
    for name, weight in mixture.named_parameters():
        drawn = torch.randn(weight.shape, generator=generator).to(dtype)
        leaves[name.replace(".", "__")] = drawn
    compare_with_reference("fused_passes", "native", run, leaves)


def test_what_it_is_made_of() -> None:
    alone = build_mixture(0, True, 16)
    assert alone.slot_score is None
    assert alone.length_score.weight.shape == (10, 1)
    slots = build_mixture(3, False, 16)
    assert slots.automaton_score is slots.length_score is None
    assert slots.slot_score.weight.shape == (3, 16)


def build_heads(width: int = 4) -> PointerMixture:
    """Return a mixture of three heads of the indexed attention and an automaton's token."""
    config = build_model("unimatrix").config
    config.hidden_size, config.index_heads = width, 3
    return PointerMixture(config, 0).double()


def draw_heads(generator: torch.Generator, num_entries: int = 9):
    """Return ids and weights of entries, sometimes none, and what an automaton found."""
    ids = torch.randint(0, 7, (2, 5, num_entries), generator=generator)
    scores = torch.randn(2, 5, 3, 1 + num_entries, generator=generator, dtype=torch.float64)
    scores[..., 1:3] = -torch.inf  # no entry
    scores[0, :2, :, 1:] = -torch.inf  # none at all
    match = (torch.full((2, 5), 3), torch.full((2, 5), 4))
    return ids, scores.softmax(dim=-1)[..., 1:], match


@torch.no_grad()
def test_heads_share_what_they_did_not_leave_to_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    mixture, (ids, weights, match) = build_heads(), draw_heads(generator)
    h = torch.randn(2, 5, 4, generator=generator, dtype=torch.float64)
    reads = {
        "indexed_attention": IndexedRead(h, ids, weights),
        "residual_context": ResidualRead(h, *match),
    }
    found, log_weights = mixture(h, reads)
    assert torch.equal(found[..., 1:], ids)
    assert torch.allclose(log_weights.exp().sum(dim=-1), torch.ones(2, 5, dtype=torch.float64))
    automaton = mixture.automaton_score(h).squeeze(-1) + mixture.length_score.weight[2, 0]
    masses = mixture.head_score(h).exp() * weights.sum(dim=-1)  # [B, T, H]
    total = 1 + automaton.exp() + masses.sum(dim=-1)
    torch.testing.assert_close(log_weights[..., 0].exp(), 1 / total)
    torch.testing.assert_close(log_weights[..., 1].exp(), automaton.exp() / total)
    shares = (mixture.head_score(h).exp().unsqueeze(-1) * weights).sum(dim=2)
    torch.testing.assert_close(log_weights[..., 2:].exp(), shares / total.unsqueeze(-1))
    assert log_weights[0, :2, 2:].isneginf().all()
    # So many tokens are summed over the vocabulary.
    logits = torch.randn(2, 5, 7, generator=generator, dtype=torch.float64)
    mixed = mix_logits(MixedLogits(logits, found, log_weights))
    assert torch.allclose(mixed.exp(), sum_up(logits, found, log_weights))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_loss_needs_the_shares_of_its_targets_alone(backend: str) -> None:
    generator = torch.Generator().manual_seed(2)
    mixture, (ids, weights, match) = build_heads(), draw_heads(generator)
    mixture.operator_options = {"backend": backend}
    h = torch.randn(2, 5, 4, generator=generator, dtype=torch.float64)
    logits = torch.randn(2, 5, 7, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, 7, (2, 5), generator=generator)
    exists, found = weights > 0, []
    for wanted in (None, targets):
        leaves = [x.detach().clone().requires_grad_() for x in (h, logits, weights)]
        reads = {
            "indexed_attention": IndexedRead(h, ids, leaves[2] * exists),
            "residual_context": ResidualRead(h, *match),
        }
        token_ids, log_weights = mixture(leaves[0], reads, wanted)
        losses = score_targets(MixedLogits(leaves[1], token_ids, log_weights), targets)
        mixture.zero_grad()
        losses.square().sum().backward()
        own = [weight.grad for weight in mixture.parameters()]
        found.append([losses, *(leaf.grad for leaf in leaves), *own])
    assert token_ids.shape == (2, 5, 1)
    for of_all, of_targets in zip(*found, strict=True):
        torch.testing.assert_close(of_targets, of_all, rtol=1e-10, atol=1e-12)


def test_gradients_of_heads() -> None:
    generator = torch.Generator().manual_seed(1)
    mixture, (ids, weights, match) = build_heads(), draw_heads(generator)
    logits = torch.randn(2, 5, 7, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, 7, (2, 5), generator=generator)

    def score(h: torch.Tensor, raw: torch.Tensor, logits: torch.Tensor, *own_weights):
        own = dict(zip(dict(mixture.named_parameters()), own_weights, strict=True))
        shown = (raw.exp() * (weights > 0)) / 30
        reads = {
            "indexed_attention": IndexedRead(h, ids, shown),
            "residual_context": ResidualRead(h, *match),
        }
        found, log_weights = torch.func.functional_call(mixture, own, (h, reads))
        mixed = MixedLogits(logits, found, log_weights)
        return score_targets(mixed, targets), mix_logits(mixed)

    drawn = (torch.randn(2, 5, 4, dtype=torch.float64), torch.randn(weights.shape), logits)
    leaves = [t.detach().double().requires_grad_() for t in (*drawn, *mixture.parameters())]
    assert torch.autograd.gradcheck(score, leaves, fast_mode=True)
