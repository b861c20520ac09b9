"""Hindsight write supervision: labels, and the gradient that the gate gets."""

import pytest
import torch

from unimatrix.ops.hindsight import HindsightRules, judge_writes, watch_reads

RULES = HindsightRules("attribution", share=0.15, floor=1e-4, weight=1.0)
M = 2  # initial slots


def set_up(label="attribution", **changes):
    """Return two reads of write 0, one of write 2 and one of an initial slot, watched."""
    log_weights = torch.tensor([[[0.5], [0.9], [0.2], [0.7]]]).log().double().requires_grad_()
    gate = torch.tensor([[[0.3], [-1.0], [2.0], [0.1]]], dtype=torch.float64, requires_grad=True)
    entries = torch.tensor([[[M + 0], [M + 0], [M + 2], [1]]])
    offered = torch.ones(1, 4, 1, dtype=torch.bool)
    rules = RULES._replace(label=label, **changes)
    return log_weights, gate, watch_reads(log_weights, gate, entries, offered, M, rules)


def backward(passed, elsewhere, scale, worth, pointer=None, loss_scale=1.0):
    """Run backward for a loss whose gradient in ln weight is minus ``worth``."""
    loss = -(passed.squeeze() * torch.tensor(worth)).sum()
    if pointer is not None:
        loss = loss - (elsewhere.squeeze() * torch.tensor(pointer)).sum()
    (loss_scale * (loss + scale.of_target + scale.of_gate)).backward()


def expect(gate, useful, weight=1.0):
    """Return the gradient of the mean binary cross entropy."""
    label = torch.tensor(useful, dtype=torch.float64).view_as(gate)
    return weight * (torch.sigmoid(gate.detach()) - label) / gate.numel()


def test_the_weights_pass_unchanged_with_their_gradient() -> None:
    log_weights, _, (passed, elsewhere, scale) = set_up()
    assert torch.equal(passed, log_weights)
    assert not elsewhere.any()
    assert scale.of_target == scale.of_gate == 0
    backward(passed, elsewhere, scale, [1.0, 0.0, 0.5, 0.0])
    assert log_weights.grad.squeeze().tolist() == [-1.0, 0.0, -0.5, 0.0]


@pytest.mark.parametrize("loss_scale", [1.0, 128.0, 1e-3])
def test_the_gate_learns_what_was_worth_it_whatever_the_scale_of_the_loss(loss_scale) -> None:
    _, gate, (passed, elsewhere, scale) = set_up()
    backward(passed, elsewhere, scale, [0.6, 0.4, 0.1, 5.0], loss_scale=loss_scale)
    # Write 0 is worth 1.0; write 2 is below 0.15 of it; the initial slot has no gate here.
    assert torch.allclose(gate.grad, loss_scale * expect(gate, [1, 0, 0, 0]))


def test_pointer_and_context_count_together() -> None:
    _, gate, (passed, elsewhere, scale) = set_up()
    backward(passed, elsewhere, scale, [0.5, 0.0, 0.05, 0.0], pointer=[0.0, 0.0, 0.1, 0.0])
    assert torch.allclose(gate.grad, expect(gate, [1, 0, 1, 0]))


def test_nothing_is_useful_below_the_floor() -> None:
    _, gate, (passed, elsewhere, scale) = set_up()
    backward(passed, elsewhere, scale, [5e-5, 0.0, 0.0, 0.0])
    assert torch.allclose(gate.grad, expect(gate, [0, 0, 0, 0]))


def test_a_harmful_read_is_not_useful() -> None:
    _, gate, (passed, elsewhere, scale) = set_up()
    backward(passed, elsewhere, scale, [-1.0, 0.2, 0.3, 0.0])
    assert torch.allclose(gate.grad, expect(gate, [0, 0, 1, 0]))


def test_read_hit_and_read_weight() -> None:
    _, gate, (passed, elsewhere, scale) = set_up("read_hit")
    backward(passed, elsewhere, scale, [0.0] * 4, pointer=[0.0, 0.0, 0.9, 0.0])
    assert torch.allclose(gate.grad, expect(gate, [0, 0, 1, 0]))
    _, gate, (passed, elsewhere, scale) = set_up("read_weight", weight=0.5)
    backward(passed, elsewhere, scale, [0.0] * 4)
    assert torch.allclose(gate.grad, expect(gate, [1, 0, 1, 0], weight=0.5))


def test_without_the_scale_in_the_loss_the_gate_learns_nothing() -> None:
    log_weights, gate, (passed, _, _) = set_up()
    passed.sum().backward()
    assert log_weights.grad is not None
    assert not gate.grad.any()


def test_labels_by_share_of_the_rows_largest() -> None:
    worth = torch.tensor([[1.0, 0.2, 0.1, 0.0], [1e-3, 2e-4, 1e-5, -1.0]])
    assert judge_writes(worth, RULES).tolist() == [
        [True, True, False, False],
        [True, True, False, False],
    ]
