"""TRL's trainers train the model as it is, pointer included, with all weights or an adapter."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import (
    DistillationConfig,
    DistillationTrainer,
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

from tests.byte_models import build_byte_model, save_model
from tests.clients.few_steps import choose_arguments
from unimatrix import UniMatrixForCausalLM, build_tokenizer
from unimatrix.errors import InputError
from unimatrix.tokenization import BOS_ID, EOS_ID

pytestmark = [
    pytest.mark.clients,
    # TRL and what it imports warn about each other, and about its own experiments.
    pytest.mark.filterwarnings("ignore"),
]
WEIGHTS = ["all weights", "LoRA"]
TEXT = "the key is 7, the key is 7."


def build_model(folder: Path, preset: str = "unimatrix") -> UniMatrixForCausalLM:
    """Return a model from a folder, where TRL finds its reference."""
    model = build_byte_model(preset, hidden_size=32, dropout=0.0)
    return UniMatrixForCausalLM.from_pretrained(save_model(folder / "start", model))


def choose_adapter(weights: str) -> dict[str, Any]:
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=8, lora_alpha=32)
    return {"peft_config": lora} if weights == "LoRA" else {}


def list_log(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def copy_pointer(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights of the pointer that are trained."""
    named = model.named_parameters()
    found = {n: p.detach().clone() for n, p in named if "pointer_mixture" in n and p.requires_grad}
    assert found
    return found


def has_moved(model: torch.nn.Module, before: dict[str, torch.Tensor]) -> bool:
    now = copy_pointer(model)
    # The second factor of an adapter starts at zero, and is what moves first.
    return any(not torch.equal(now[name], before[name]) for name in before)


@pytest.mark.client("TRL", "SFTTrainer, {weights}, preset {preset}")
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("preset", ["unimatrix", "sparsepointer", "core"])
def test_sft_learns_the_text_and_its_end(tmp_path, preset, weights) -> None:
    rows = Dataset.from_list([{"text": TEXT}] * 8)
    trainer = SFTTrainer(
        model=build_model(tmp_path, preset),
        args=SFTConfig(**choose_arguments(tmp_path, max_steps=20, learning_rate=3e-2)),
        train_dataset=rows,
        processing_class=build_tokenizer(split_special_tokens=False),
        **choose_adapter(weights),
    )
    ids = trainer.train_dataset[0]["input_ids"]
    assert ids == [BOS_ID, *TEXT.encode(), EOS_ID]
    pointer = copy_pointer(trainer.model) if preset == "unimatrix" else None
    trainer.train()
    losses = list_log(trainer, "loss")
    assert losses[-1] < 0.8 * losses[0]
    assert pointer is None or has_moved(trainer.model, pointer)
    model = trainer.model.eval()
    row = torch.tensor([ids])
    with torch.no_grad():
        own = model(input_ids=row, labels=row)
        fused = model(input_ids=row, labels=row, fused_lm_head=True)
    torch.testing.assert_close(fused.loss, own.loss, rtol=1e-4, atol=1e-5)
    if weights == "all weights":
        assert own.logits[0, -2].argmax() == EOS_ID


@pytest.mark.client("TRL", "DPOTrainer, {weights}")
@pytest.mark.parametrize("weights", WEIGHTS)
def test_dpo_prefers_what_was_chosen(tmp_path, weights) -> None:
    rows = [{"prompt": "say aaaa: ", "chosen": "aaaa", "rejected": "bbbb"}] * 8
    trainer = DPOTrainer(
        model=build_model(tmp_path),
        args=DPOConfig(**choose_arguments(tmp_path)),
        train_dataset=Dataset.from_list(rows),
        processing_class=build_tokenizer(split_special_tokens=False),
        **choose_adapter(weights),
    )
    assert trainer.train_dataset[0]["chosen_ids"][-1] == EOS_ID
    pointer = copy_pointer(trainer.model)
    trainer.train()
    margins = list_log(trainer, "rewards/margins")
    assert abs(margins[0]) < 1e-4
    assert margins[-1] > 0.5
    assert has_moved(trainer.model, pointer)


@pytest.mark.client("TRL", "KTOTrainer, {weights}")
@pytest.mark.parametrize("weights", WEIGHTS)
def test_kto_learns_what_is_desired(tmp_path, weights) -> None:
    rows = [
        {"prompt": "say: ", "completion": "aaaa", "label": True},
        {"prompt": "say: ", "completion": "bbbb", "label": False},
    ]
    trainer = KTOTrainer(
        model=build_model(tmp_path),
        args=KTOConfig(**choose_arguments(tmp_path)),
        train_dataset=Dataset.from_list(rows * 4),
        processing_class=build_tokenizer(split_special_tokens=False),
        **choose_adapter(weights),
    )
    trainer.train()
    margins = list_log(trainer, "rewards/margins")
    assert margins[-1] > 0.2 > abs(margins[0])


def count_letters(completions: list[str], **_others: Any) -> list[float]:
    return [completion.count("e") / 8 for completion in completions]


def build_sampler(
    trainer_class: Any, config_class: Any, tmp_path: Path, weights: str, **given: Any
) -> Any:
    """Return a trainer whose reward counts a letter."""
    model = build_model(tmp_path)
    with torch.no_grad():  # Begins near letters, so that a reward is found.
        model.lm_head.weight[[*range(97), *range(123, 259)]] *= 0.1
    arguments = choose_arguments(
        tmp_path,
        per_device_train_batch_size=16,
        num_generations=16,
        max_completion_length=8,
        max_steps=15,
        bf16=False,
        **given,
    )
    return trainer_class(
        model=model,
        args=config_class(**arguments),
        reward_funcs=count_letters,
        train_dataset=Dataset.from_list([{"prompt": "eee"}, {"prompt": "see the bee"}] * 8),
        processing_class=build_tokenizer(split_special_tokens=False),
        **choose_adapter(weights),
    )


@pytest.mark.client("TRL", "GRPOTrainer, {weights}")
@pytest.mark.parametrize("weights", WEIGHTS)
def test_grpo_samples_and_scores_one_distribution(tmp_path, weights) -> None:
    trainer = build_sampler(GRPOTrainer, GRPOConfig, tmp_path, weights, temperature=0.8)
    pointer = copy_pointer(trainer.model)
    batch = [trainer.train_dataset[i] for i in (0, 1)] * 8
    trainer.model.eval()
    found = trainer._generate_and_score_completions(batch)
    ids = torch.cat([found["prompt_ids"], found["completion_ids"]], dim=1)
    mask = torch.cat([found["prompt_mask"], found["completion_mask"]], dim=1)
    num_new = found["completion_ids"].shape[1]
    with torch.no_grad():
        scored, *_ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, num_new)
        # What `generate` draws from: the model's own logits, divided by the temperature.
        logits = trainer.model(input_ids=ids, attention_mask=mask).logits[:, -num_new - 1 : -1]
    drawn = (logits / 0.8).log_softmax(-1).gather(-1, found["completion_ids"][..., None])
    kept = found["completion_mask"].bool()
    torch.testing.assert_close(scored[kept], drawn.squeeze(-1)[kept], rtol=1e-3, atol=1e-3)
    trainer.model.train()
    trainer.train()
    rewards = list_log(trainer, "reward")
    assert sum(rewards[-3:]) > sum(rewards[:3])
    assert has_moved(trainer.model, pointer)


@pytest.mark.client("TRL", "RLOOTrainer, {weights}")
@pytest.mark.parametrize("weights", WEIGHTS)
def test_rloo_earns_more(tmp_path, weights) -> None:
    trainer = build_sampler(RLOOTrainer, RLOOConfig, tmp_path, weights)
    trainer.train()
    rewards = list_log(trainer, "reward")
    assert sum(rewards[-3:]) > sum(rewards[:3])


def build_distiller(tmp_path: Path, preset: str) -> DistillationTrainer:
    return DistillationTrainer(
        model=build_model(tmp_path, preset),
        teacher_model=build_model(tmp_path, preset),
        args=DistillationConfig(**choose_arguments(tmp_path, max_steps=2, max_completion_length=4)),
        train_dataset=Dataset.from_list([{"prompt": "say: "}] * 8),
        processing_class=build_tokenizer(split_special_tokens=False),
    )


@pytest.mark.client("TRL", "DistillationTrainer, preset unimatrix")
def test_distillation_without_the_pointer_is_refused(tmp_path, record_property) -> None:
    with pytest.raises(InputError, match="its pointer is no part of lm_head") as caught:
        build_distiller(tmp_path, "unimatrix").train()
    record_property("refusal", str(caught.value))


@pytest.mark.client("TRL", "DistillationTrainer, preset core")
def test_distillation_where_the_head_is_all(tmp_path) -> None:
    trainer = build_distiller(tmp_path, "core")
    trainer.train()
    assert list_log(trainer, "loss")


def test_rows_of_ids_need_no_special_tokens_in_text(tmp_path) -> None:
    """What a corpus that is not trusted takes: ids, of which TRL changes none."""
    tokenizer = build_tokenizer()
    ids = [*tokenizer("say <|eos|> twice").input_ids, tokenizer.eos_token_id]
    trainer = SFTTrainer(
        model=build_model(tmp_path, "core"),
        args=SFTConfig(**choose_arguments(tmp_path, max_steps=1)),
        train_dataset=Dataset.from_list([{"input_ids": ids}] * 4),
        processing_class=tokenizer,
    )
    assert trainer.train_dataset[0]["input_ids"] == ids
    assert ids.count(EOS_ID) == 1
    trainer.train()
