"""The pointer mixture against the sum of probabilities that it stands for."""

import torch

from unimatrix.nn.pointer_mixture import MixedLogits, mix_logits, score_targets


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
