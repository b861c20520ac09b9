"""The pointer mixture against the sum of probabilities that it stands for."""

import pytest
import torch

from tests.models import build_model
from tests.ops.oracle import compare_with_reference
from unimatrix.nn.pointer_mixture import MixedLogits, PointerMixture, mix_logits, score_targets
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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("width", [16, 27])
@pytest.mark.parametrize(("num_reads", "matches"), [(0, True), (3, True), (2, False)])
@pytest.mark.parametrize("learns", [False, True])
def test_one_pass_is_what_the_modules_do(num_reads, matches, learns, width, dtype) -> None:
    """With slots, an automaton or both; what was not found has a share of zero."""
    config = build_model("unimatrix").config
    config.hidden_size, config.automaton_pointer = width, matches
    module = PointerMixture(config, num_reads).to(dtype)
    generator = torch.Generator().manual_seed(0)
    log_strength, slot_ids, match = draw_found(50, num_reads, generator)
    names = [name.replace(".", "_") for name, _ in module.named_parameters()]

    def run(backend: str, h, log_strength, elsewhere, **weights) -> dict[str, torch.Tensor]:
        module.backend = backend
        by_name = {name: weights[name.replace(".", "_")] for name, _ in module.named_parameters()}
        read = SelectiveRead(h, slot_ids, log_strength, elsewhere, None) if num_reads else None
        h, ids, log_weights = torch.func.functional_call(module, by_name, (h, read, match))
        # A share of zero has no finite logarithm to be compared.
        found = {"ids": ids, "h": h, "log_weights": log_weights.clamp_min(-1e3)}
        return found | {"none": log_weights.isneginf()}

    leaves = {
        "h": torch.randn(2, 50, width, generator=generator).to(dtype),
        "log_strength": log_strength.to(dtype),
        "elsewhere": torch.zeros_like(log_strength).to(dtype) if learns else None,
    }
    for name, weight in zip(names, module.parameters(), strict=True):
        leaves[name] = torch.randn(weight.shape, generator=generator).to(dtype)
    compare_with_reference("fused_passes", "native", run, leaves)


def test_layers_that_are_hooked_are_called() -> None:
    module = PointerMixture(build_model("unimatrix").config, 1)
    h, read = torch.zeros(2, 40, module.slot_score.in_features), None
    assert module._is_one_pass(h, read)
    assert not module._is_one_pass(h[:, :8], read)
    for layer in (module, module.slot_score, module.length_score):
        hook = layer.register_forward_hook(lambda *_: None)
        assert not module._is_one_pass(h, read)
        hook.remove()
    module.backend = "reference"
    assert not module._is_one_pass(h, read)
