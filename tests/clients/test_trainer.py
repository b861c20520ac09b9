"""transformers' own Trainer: evaluation, the best model, metrics and prediction."""

import math

import pytest
import torch
from transformers import Trainer, TrainingArguments

from tests.byte_models import build_byte_model
from unimatrix.tokenization import BOS_ID, VOCAB_SIZE

TEXTS = [b"the key is 7, the key is 7", b"the key is 4, the key is 4"] * 4


def build_rows() -> list[dict[str, list[int]]]:
    ids = [[BOS_ID, *text] for text in TEXTS]
    return [{"input_ids": row, "labels": row} for row in ids]


def build_trainer(folder, preset: str = "unimatrix", **others) -> Trainer:
    given = {"metric": None} | others
    compute_metrics = given.pop("metric")
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        max_steps=9,
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=3,
        save_steps=3,
        report_to="none",
        disable_tqdm=True,
        **given,
    )
    return Trainer(
        build_byte_model(preset, dropout=0.0),
        arguments,
        train_dataset=build_rows(),
        eval_dataset=build_rows()[:4],
        compute_metrics=compute_metrics,
    )


@pytest.mark.client("transformers", "Trainer: evaluation and load_best_model_at_end")
def test_the_best_model_is_the_one_with_the_least_eval_loss(tmp_path) -> None:
    trainer = build_trainer(tmp_path, load_best_model_at_end=True)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.state.best_metric == pytest.approx(min(losses))
    after = trainer.evaluate()["eval_loss"]
    assert after == pytest.approx(min(losses), rel=1e-5)
    assert after < 0.8 * before
    row = torch.tensor([build_rows()[0]["input_ids"], build_rows()[1]["input_ids"]])
    with torch.no_grad():
        own = float(trainer.model.eval()(input_ids=row, labels=row).loss)
    assert after == pytest.approx(own, rel=1e-4)


@pytest.mark.client("transformers", "Trainer: compute_metrics and predict, preset {preset}")
@pytest.mark.parametrize("preset", ["core", "sparsepointer", "unimatrix"])
def test_metrics_and_predictions_are_of_the_logits_alone(tmp_path, preset) -> None:
    seen = []

    def compute_metrics(found) -> dict[str, float]:
        seen.append(found.predictions.shape)
        right = found.predictions[:, :-1].argmax(-1) == found.label_ids[:, 1:]
        return {"accuracy": float(right.mean())}

    trainer = build_trainer(tmp_path, preset, metric=compute_metrics)
    shape = (4, len(TEXTS[0]) + 1, VOCAB_SIZE)
    assert 0 <= trainer.evaluate()["eval_accuracy"] <= 1
    found = trainer.predict(build_rows()[:4])
    assert seen == [shape, shape]
    assert found.predictions.shape == shape
    assert math.isfinite(found.metrics["test_loss"])


@pytest.mark.client("transformers", "Trainer: label_smoothing_factor")
def test_label_smoothing_smooths_the_next_token(tmp_path) -> None:
    trainer = build_trainer(tmp_path, label_smoothing_factor=0.1)
    row = torch.tensor([build_rows()[0]["input_ids"]])
    model = trainer.model.eval()
    with torch.no_grad():
        found = trainer.compute_loss(model, {"input_ids": row, "labels": row})
        log_vocab = model(input_ids=row).logits[:, :-1].log_softmax(-1)
    nll = -log_vocab.gather(-1, row[:, 1:, None]).mean()
    torch.testing.assert_close(found, 0.9 * nll - 0.1 * log_vocab.mean())
