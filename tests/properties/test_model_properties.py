"""Laws that every preset and residual path obeys."""

import math

import pytest
import torch

from tests.models import VARIANTS, build_model, draw_ids
from tests.tolerances import error, limit
from unimatrix.cache import UniMatrixCache
from unimatrix.modeling import UniMatrixForCausalLM

LIMIT = limit("model", torch.float64, "value")
T = 26
variants = pytest.mark.parametrize("variant", VARIANTS)


def run(model, ids, **kwargs):
    with torch.no_grad():
        return model(ids, use_cache=True, **kwargs)


def assert_same_cache(actual: UniMatrixCache, expected: UniMatrixCache) -> None:
    ours, theirs = actual.tensors(), expected.tensors()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        if "automaton" in name or "dense" in name:
            continue  # capacity and padding columns may differ; what they answer is compared
        if tensor.is_floating_point():
            assert error(ours[name], tensor) <= LIMIT, name
        else:
            assert torch.equal(ours[name], tensor), name


@variants
def test_causality(variant: str) -> None:
    model = build_model(variant)
    ids = draw_ids(2, T)
    before = run(model, ids).logits
    for position in (T - 1, T // 2, 1, 0):
        changed = ids.clone()
        changed[:, position] = 3 + (changed[:, position] - 3 + 1) % 9
        after = run(model, changed).logits
        assert torch.equal(after[:, :position], before[:, :position]) or (
            error(after[:, :position], before[:, :position]) <= LIMIT
        )
        assert error(after[:, position], before[:, position]) > 1e-6


def test_the_published_leak_would_be_caught(monkeypatch) -> None:
    """Hand the final state of a depth step to the start of the next, as the published code does."""
    model = build_model("core")
    forward, final = model.model.block.forward, {}

    def leak(x, tokens, carry):
        x, states, votes = forward(x, tokens, {**carry, **final})
        final["matrix_mixer"] = states["matrix_mixer"]
        return x, states, votes

    monkeypatch.setattr(model.model.block, "forward", leak)
    ids = draw_ids(1, T)
    changed = ids.clone()
    changed[:, -1] = 3 + (changed[:, -1] - 3 + 1) % 9
    before = run(model, ids).logits
    final.clear()
    moved = (run(model, changed).logits[:, 0] - before[:, 0]).abs().max()
    assert moved > 1e-3


@variants
@pytest.mark.parametrize("splits", [[1] * T, [13, 13], [1, 5, 20], [25, 1]], ids=str)
def test_one_pass_equals_any_split(variant: str, splits: list[int]) -> None:
    model = build_model(variant)
    ids = draw_ids(2, T)
    whole = run(model, ids)
    cache, logits = None, []
    for chunk in ids.split(splits, dim=1):
        output = run(model, chunk, past_key_values=cache)
        cache = output.past_key_values
        logits.append(output.logits)
    assert error(torch.cat(logits, dim=1), whole.logits) <= LIMIT
    assert_same_cache(cache, whole.past_key_values)
    following = draw_ids(2, 3, seed=5)
    continued = run(model, following, past_key_values=cache).logits
    expected = run(model, following, past_key_values=whole.past_key_values).logits
    assert error(continued, expected) <= LIMIT


@variants
def test_rows_are_independent(variant: str) -> None:
    model = build_model(variant)
    ids = draw_ids(3, T)
    together = run(model, ids).logits
    for row in range(3):
        assert error(run(model, ids[row : row + 1]).logits[0], together[row]) <= LIMIT


@variants
def test_padding_anywhere_changes_nothing(variant: str) -> None:
    """Left, right and interior padding, on a fresh and on a warm cache."""
    model = build_model(variant)
    ids, prefix = draw_ids(1, 12), draw_ids(1, 5, seed=3)
    masks = {
        "none": [1] * 12 + [0] * 4,
        "left": [0] * 4 + [1] * 12,
        "interior": [1, 0, 1, 1, 0, 0] + [1] * 9 + [0],
        "both": [0, 0] + [1] * 12 + [0, 0],
    }
    warm = run(model, prefix)
    for past in (None, warm.past_key_values):
        expected = run(model, ids, past_key_values=past)
        rows, mask = [], torch.tensor(list(masks.values()))
        for row_mask in mask:
            row = torch.full((16,), 7)
            row[row_mask.bool()] = ids[0]
            rows.append(row)
        copies = None if past is None else past.select_rows(torch.zeros(4, dtype=torch.int64))
        padded = run(model, torch.stack(rows), attention_mask=mask, past_key_values=copies)
        for i in range(4):
            assert error(padded.logits[i][mask[i].bool()], expected.logits[0]) <= LIMIT
            row_cache = padded.past_key_values.select_rows(torch.tensor([i]))
            assert_same_cache(row_cache, expected.past_key_values)
            following = draw_ids(1, 4, seed=9)
            continued = run(model, following, past_key_values=row_cache).logits
            direct = run(model, following, past_key_values=expected.past_key_values).logits
            assert error(continued, direct) <= LIMIT


@variants
def test_padding_leaves_gradients_alone(variant: str) -> None:
    model = build_model(variant).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    ids = draw_ids(1, 9)
    mask = torch.tensor([[0, 0, 0] + [1] * 9])
    padded_ids = torch.cat([torch.zeros(1, 3, dtype=torch.int64), ids], dim=1)
    labels = padded_ids.masked_fill(mask == 0, -100)
    labels[0, 3] = -100  # a first token is predicted by nothing
    grads = []
    for inputs in (
        {"input_ids": ids, "labels": ids},
        {"input_ids": padded_ids, "attention_mask": mask, "labels": labels},
    ):
        model.zero_grad(set_to_none=True)
        model(**inputs).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert error(grads[1][name], grad) <= 1e-9, name


@variants
def test_a_fully_padded_row_keeps_its_cache_bitwise(variant: str) -> None:
    model = build_model(variant)
    warm = run(model, draw_ids(2, 6)).past_key_values
    mask = torch.tensor([[1, 1, 1], [0, 0, 0]])
    after = run(model, draw_ids(2, 3, seed=4), attention_mask=mask, past_key_values=warm)
    row, before = torch.tensor([1]), warm.select_rows(torch.tensor([1])).tensors()
    for name, tensor in after.past_key_values.select_rows(row).tensors().items():
        if "dense" in name:
            continue  # grows by columns that are marked as padding
        assert torch.equal(tensor, before[name]), name
    # No hidden state, so all logits are equal: 0, or ln of equal probabilities.
    expected = -math.log(23) if model.config.uses_mixture else 0.0
    assert error(after.logits[1], torch.full_like(after.logits[1], expected)) <= 1e-12


@variants
def test_forward_never_alters_the_callers_cache(variant: str) -> None:
    model = build_model(variant)
    cache = run(model, draw_ids(2, 9)).past_key_values
    copies = {name: tensor.clone() for name, tensor in cache.tensors().items()}
    first = run(model, draw_ids(2, 4, seed=1), past_key_values=cache).logits
    second = run(model, draw_ids(2, 4, seed=1), past_key_values=cache).logits
    assert torch.equal(first, second)
    for name, tensor in cache.tensors().items():
        assert torch.equal(tensor, copies[name]), name


@variants
def test_cache_file_round_trip(variant: str, tmp_path) -> None:
    model = build_model(variant)
    cache = run(model, draw_ids(2, 9)).past_key_values
    cache.save(tmp_path / "stream.safetensors")
    loaded = UniMatrixCache.load(tmp_path / "stream.safetensors")
    assert loaded.num_bytes() == cache.num_bytes() > 0
    following = draw_ids(2, 5, seed=2)
    assert torch.equal(
        run(model, following, past_key_values=loaded).logits,
        run(model, following, past_key_values=cache).logits,
    )


@variants
def test_cache_size_is_constant(variant: str) -> None:
    """All but the dense associative memory and the unbounded automaton."""
    model = build_model(variant)
    few = run(model, draw_ids(1, 10)).past_key_values.bytes_by_part()
    many = run(model, draw_ids(1, 70)).past_key_values.bytes_by_part()
    grows = {"dense_memory"} if model.config.associative_memory == "dense" else set()
    if model.config.residual_path == "suffix_automaton" and not model.config.automaton_window:
        grows.add("automaton")
    assert {part for part in few if many[part] != few[part]} == grows


@variants
def test_exact_gradients_through_a_chunk_border(variant: str) -> None:
    model = build_model(variant)
    ids = draw_ids(2, 14)
    weights = torch.randn(2, 14, 23, generator=torch.Generator().manual_seed(1)).double()
    grads = []
    for splits in ([14], [6, 8]):
        model.zero_grad(set_to_none=True)
        cache, total = None, torch.zeros((), dtype=torch.float64)
        start = 0
        for chunk in ids.split(splits, dim=1):
            output = model(chunk, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            total = total + (output.logits * weights[:, start : start + chunk.shape[1]]).sum()
            start += chunk.shape[1]
        total.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for name, grad in grads[0].items():
        assert error(grads[1][name], grad) <= 1e-9, name


@variants
def test_bfloat16_stays_finite(variant: str) -> None:
    model = build_model(variant, dtype=torch.bfloat16).train()
    output = model(draw_ids(2, 40), labels=draw_ids(2, 40))
    output.loss.backward()
    assert torch.isfinite(output.logits).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    with torch.no_grad():
        cache = model.eval()(draw_ids(2, 5)).past_key_values
    for name, tensor in cache.tensors().items():
        if "matrix_state" in name or "slot_" in name:
            assert tensor.dtype == torch.float32 or not tensor.is_floating_point(), name


@variants
def test_autocast_trains(variant: str) -> None:
    model = build_model(variant, dtype=torch.float32).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(draw_ids(2, 20), labels=draw_ids(2, 20)).loss
    loss.backward()
    assert torch.isfinite(loss)


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_mixed_precision_keeps_the_state_in_float32(variant: str) -> None:
    """Matrix products in bfloat16: nearly the same loss and direction, the state as it was."""
    torch.manual_seed(0)
    # As a training starts; the weights of the other tests are made to magnify every difference.
    model = UniMatrixForCausalLM(build_model(variant).config).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    ids = draw_ids(2, 40, seed=4)
    gradients, losses = [], []
    for enabled in (False, True):
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = model(ids, labels=ids, use_cache=True)
        output.loss.backward()
        losses.append(output.loss.item())
        gradients.append(
            torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        )
        for name, tensor in output.past_key_values.tensors().items():
            assert tensor.dtype != torch.bfloat16, name
    assert output.loss.dtype == torch.float32
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    assert torch.isfinite(gradients[1]).all()
    # Which pair is the best of all may fall otherwise in 8 bits (assoc-hard reads one).
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.9
