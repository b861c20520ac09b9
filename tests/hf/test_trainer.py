"""Plain ``transformers.Trainer`` evaluates, keeps the best model and predicts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.utils.generic import find_labels

from tests.models import VARIANTS, build_model, draw_ids
from unimatrix.baselines.linear_attention.modeling import LinearAttentionForCausalLM
from unimatrix.modeling import UniMatrixForCausalLM, UniMatrixModel

ROWS, TOKENS, VOCAB = 4, 10, 23


class Rows(Dataset[dict[str, torch.Tensor]]):
    """Rows of ids that are their own labels."""

    def __init__(self) -> None:
        self.ids = draw_ids(ROWS, TOKENS)

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def build_trainer(model: Any, folder: Path, **options: Any) -> Trainer:
    """Return a Trainer of two optimiser steps that evaluates after each."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    rows = Rows()
    return Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows, **options)


def wrap(model: PreTrainedModel, adapter: str) -> Any:
    """Return the model bare or inside a PEFT wrapper that trains every linear layer."""
    if adapter == "bare":
        return model
    peft = pytest.importorskip("peft")
    task = "CAUSAL_LM" if adapter == "causal-lm" else None
    return peft.get_peft_model(model, peft.LoraConfig(task_type=task, target_modules="all-linear"))


@pytest.mark.parametrize(
    ("variant", "adapter"),
    [
        ("core", "bare"),
        ("sparsepointer", "bare"),
        ("selective", "bare"),
        ("selective", "causal-lm"),
        ("selective", "any-task"),
    ],
)
def test_evaluation_has_a_loss_and_the_best_model_is_kept(
    variant: str, adapter: str, tmp_path: Path
) -> None:
    model = wrap(build_model(variant, dtype=torch.float32), adapter)
    trainer = build_trainer(model, tmp_path)
    before = trainer.evaluate()["eval_loss"]
    with torch.no_grad():
        expected = model(input_ids=Rows().ids, labels=Rows().ids).loss
    assert before == pytest.approx(float(expected), rel=1e-5)
    trainer.train()
    assert trainer.state.best_model_checkpoint is not None
    assert trainer.state.best_metric < before


@pytest.mark.parametrize("variant", ["core", "sparsepointer", "selective", "selective+small"])
def test_predictions_are_the_logits_alone(variant: str, tmp_path: Path) -> None:
    seen: list[Any] = []

    def compute_metrics(evaluated: Any) -> dict[str, float]:
        seen.append((evaluated.predictions.shape, evaluated.label_ids.shape))
        return {"accuracy": 0.5}

    def preprocess(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        assert isinstance(logits, torch.Tensor)
        seen.append((tuple(logits.shape), tuple(labels.shape)))
        return logits

    model = build_model(variant, dtype=torch.float32)
    trainer = build_trainer(
        model, tmp_path, compute_metrics=compute_metrics, preprocess_logits_for_metrics=preprocess
    )
    found = trainer.predict(Rows())
    assert found.metrics["test_accuracy"] == 0.5
    batch = (2, TOKENS, VOCAB), (2, TOKENS)
    assert seen == [batch, batch, ((ROWS, TOKENS, VOCAB), (ROWS, TOKENS))]
    with torch.no_grad():
        logits = model(Rows().ids).logits
    assert torch.allclose(torch.from_numpy(found.predictions), logits, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_but_logits_is_left_to_predict(variant: str) -> None:
    model = build_model(variant)
    ignored = model.config.keys_to_ignore_at_inference
    output = model(draw_ids(1, 4), labels=draw_ids(1, 4))
    assert [name for name in output if name not in [*ignored, "loss"]] == ["logits"]


def test_labels_are_the_only_parameter_that_trainer_takes_for_labels() -> None:
    assert find_labels(UniMatrixForCausalLM) == ["labels"]
    assert find_labels(LinearAttentionForCausalLM) == ["labels"]
    assert find_labels(UniMatrixModel) == []
