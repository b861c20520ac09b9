"""Trainers that put several texts into one row: they learn, and no text reads another."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from tests.byte_models import build_byte_model
from tests.clients.few_steps import choose_arguments
from unimatrix import UniMatrixForCausalLM, build_tokenizer
from unimatrix.tokenization import BOS_ID, EOS_ID

pytestmark = [
    pytest.mark.clients,
    # TRL warns of attention that mixes packed texts: it knows of no model without attention.
    pytest.mark.filterwarnings("ignore"),
]
PRESETS = ["core", "sparsepointer", "selective", "unimatrix"]
presets = pytest.mark.parametrize("preset", PRESETS)
# The second text begins as the first, which a model that reads over its end would copy.
TEXTS = ["the key is 7, the key is 7.", "the key is 74, and no other.", "seven.", "a key."]


def build_model(preset: str) -> UniMatrixForCausalLM:
    return build_byte_model(preset, hidden_size=32, dropout=0.0)


def assert_rows_are_alone(trainer: Trainer, batch: dict[str, Any], rows: list[list[int]]) -> None:
    """Check the trainer's loss of a packed batch against that of its rows, one by one."""
    trainer.model.eval()
    ids = batch["input_ids"]
    assert ids.shape == (1, sum(map(len, rows))), "all texts are in one row"
    with torch.no_grad():
        found = trainer.compute_loss(trainer.model, dict(batch))
        total = sum(
            trainer.model(input_ids=row, labels=row, num_items_in_batch=1).loss
            for row in (torch.tensor([row]) for row in rows)
        )
    targets = sum(len(row) - 1 for row in rows)
    torch.testing.assert_close(found, total / targets, rtol=1e-5, atol=1e-6)


def assert_learns(trainer: Trainer) -> None:
    trainer.model.train()
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.client("TRL", "SFTTrainer, padding_free, preset {preset}")
@presets
def test_sft_without_padding(tmp_path: Path, preset: str) -> None:
    trainer = SFTTrainer(
        model=build_model(preset),
        args=SFTConfig(
            **choose_arguments(tmp_path, learning_rate=2e-2), padding_free=True, max_length=None
        ),
        train_dataset=Dataset.from_list([{"text": text} for text in TEXTS]),
        processing_class=build_tokenizer(split_special_tokens=False),
    )
    rows = [[BOS_ID, *text.encode(), EOS_ID] for text in TEXTS]
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(TEXTS))])
    assert {"position_ids", "cu_seq_lens_q", "max_length_q"} <= batch.keys()
    assert_rows_are_alone(trainer, batch, rows)
    assert_learns(trainer)


@pytest.mark.client("TRL", "SFTTrainer, packing, preset {preset}")
@presets
def test_sft_packed(tmp_path: Path, preset: str) -> None:
    trainer = SFTTrainer(
        model=build_model(preset),
        args=SFTConfig(
            **choose_arguments(tmp_path, learning_rate=2e-2, per_device_train_batch_size=1),
            packing=True,
            max_length=128,
        ),
        train_dataset=Dataset.from_list([{"text": text} for text in TEXTS]),
        processing_class=build_tokenizer(split_special_tokens=False),
    )
    packed = trainer.train_dataset[0]
    assert len(trainer.train_dataset) == 1, "the texts fit into one row"
    lengths = list(packed["seq_lengths"])
    rows = [part.tolist() for part in torch.tensor(packed["input_ids"]).split(lengths)]
    assert sorted(rows) == sorted([BOS_ID, *text.encode(), EOS_ID] for text in TEXTS)
    assert_rows_are_alone(trainer, trainer.data_collator([packed]), rows)
    assert_learns(trainer)


@pytest.mark.client("transformers", "Trainer: DataCollatorWithFlattening, {marks}, preset {preset}")
@pytest.mark.parametrize("marks", ["position_ids", "seq_idx", "flash_attn_kwargs"])
@presets
def test_the_flattening_collator(tmp_path: Path, preset: str, marks: str) -> None:
    rows = [[BOS_ID, *text.encode()] for text in TEXTS]
    chosen = {
        f"return_{name}": name == marks for name in ("position_ids", "seq_idx", "flash_attn_kwargs")
    }
    collate = DataCollatorWithFlattening(**chosen)
    data = Dataset.from_list([{"input_ids": row} for row in rows])
    trainer = Trainer(
        build_model(preset),
        TrainingArguments(
            **choose_arguments(tmp_path, learning_rate=2e-2), per_device_eval_batch_size=4
        ),
        train_dataset=data,
        eval_dataset=data,
        data_collator=collate,
    )
    (batch,) = trainer.get_eval_dataloader()  # Columns that `forward` lacks are gone by now.
    assert_rows_are_alone(trainer, batch, rows)
    before = trainer.evaluate()["eval_loss"]
    assert_learns(trainer)
    assert trainer.evaluate()["eval_loss"] < 0.8 * before


@pytest.mark.client("transformers", "Trainer: a data set with a column position_ids")
def test_a_column_of_positions_reaches_the_model(tmp_path: Path) -> None:
    rows = [[BOS_ID, *text.encode()] for text in TEXTS]
    ids = [token for row in rows for token in row]
    packed = {
        "input_ids": ids,
        "labels": ids,
        "position_ids": [t for row in rows for t in range(len(row))],
        "note": "dropped",
    }
    trainer = Trainer(
        build_model("unimatrix"),
        TrainingArguments(
            **choose_arguments(tmp_path, learning_rate=2e-2), per_device_eval_batch_size=1
        ),
        train_dataset=Dataset.from_list([packed]),
        eval_dataset=Dataset.from_list([packed]),
    )
    (batch,) = trainer.get_eval_dataloader()
    assert set(batch) == {"input_ids", "labels", "position_ids"}
    assert_rows_are_alone(trainer, batch, rows)
    assert_learns(trainer)
