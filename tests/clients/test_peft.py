"""PEFT's adapters for causal models, by the standard recipe."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from tests.byte_models import build_byte_model
from unimatrix import UniMatrixForCausalLM
from unimatrix.tokenization import BOS_ID

pytestmark = pytest.mark.clients
IDS = torch.tensor([[BOS_ID, *b"the key is 7, the key is 7"]] * 2)


def adapt(preset: str) -> PeftModel:
    torch.manual_seed(0)
    model = build_byte_model(preset, dropout=0.0)
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))


def train(model: torch.nn.Module, num_updates: int = 8) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(num_updates):
        loss = model(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.client("PEFT", 'LoRA, target_modules="all-linear", preset {preset}')
@pytest.mark.parametrize("preset", ["core", "sparsepointer", "unimatrix"])
def test_lora_trains_saves_and_merges(tmp_path, preset) -> None:
    model = adapt(preset).train()
    losses = train(model)
    assert losses[-1] < 0.9 * losses[0]
    with torch.no_grad():
        logits = model.eval()(input_ids=IDS).logits
        written = model.generate(input_ids=IDS[:1], max_new_tokens=4, do_sample=False)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(build_byte_model(preset), tmp_path / "adapter").eval()
    merged = again.merge_and_unload()
    assert type(merged) is UniMatrixForCausalLM
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=IDS).logits, logits, rtol=1e-3, atol=1e-3)
    assert torch.equal(
        merged.generate(input_ids=IDS[:1], max_new_tokens=4, do_sample=False), written
    )
