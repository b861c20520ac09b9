"""What wraps modules: hooks, and weights that lie elsewhere until a module is called."""

from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload

from tests.byte_models import build_byte_model
from unimatrix.presets import PRESETS

presets = pytest.mark.parametrize("preset", PRESETS)
IDS = torch.randint(97, 110, (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.mark.client("accelerate", "{place}_offload, preset {preset}")
@pytest.mark.parametrize("place", ["cpu", "disk"])
@presets
@torch.no_grad()
def test_offloaded_weights_say_the_same(preset: str, place: str, tmp_path: Path) -> None:
    expected = build_byte_model(preset)
    model = build_byte_model(preset)
    if place == "cpu":
        cpu_offload(model, execution_device="cpu")
    else:
        disk_offload(model, str(tmp_path), execution_device="cpu")
    assert all(weight.is_meta for weight in model.parameters())
    first, found = expected(IDS), model(IDS)
    torch.testing.assert_close(found.logits, first.logits, rtol=1e-4, atol=1e-4)
    # On from the cache, whose keys, if it keeps any, are of weights that may change.
    later = IDS[:, :3] + 1
    torch.testing.assert_close(
        model(later, past_key_values=found.past_key_values).logits,
        expected(later, past_key_values=first.past_key_values).logits,
        rtol=1e-4,
        atol=1e-4,
    )
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(IDS, **options), expected.generate(IDS, **options))


@pytest.mark.client("torch", "a full backward hook on lm_head, preset {preset}")
@presets
def test_a_hook_on_the_head_sees_its_gradient(preset: str) -> None:
    model = build_byte_model(preset)
    model(IDS, labels=IDS).loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    seen: list[torch.Tensor] = []
    kept: list[torch.Tensor] = []
    model.lm_head.register_full_backward_hook(
        lambda _module, _inputs, outputs: seen.extend(outputs)
    )
    model.lm_head.register_forward_hook(lambda _module, _inputs, output: kept.append(output))
    output = model(IDS, labels=IDS)
    output.loss.backward()
    assert [gradient.shape for gradient in seen] == [output.logits.shape]
    with torch.no_grad():  # The head's own product, to which votes are added later.
        hidden = model.model(IDS).last_hidden_state.as_subclass(torch.Tensor)
        torch.testing.assert_close(kept[0], hidden @ model.lm_head.weight.T, rtol=1e-4, atol=1e-4)
    for name, gradient in expected.items():
        found = model.get_parameter(name).grad
        torch.testing.assert_close(found, gradient, rtol=1e-3, atol=1e-5, msg=name)
