"""A row's loss is the same whatever stands beside it in the batch."""

import pytest
import torch
from transformers import DataCollatorForLanguageModeling

from tests.models import build_model, draw_ids
from tests.tolerances import error
from unimatrix import build_tokenizer

# No pointer, votes, and a mixture.
variants = pytest.mark.parametrize("variant", ["core", "sparsepointer", "unimatrix"])


def pad_rows(rows: list[torch.Tensor], side: str) -> tuple[torch.Tensor, ...]:
    """Return ids, mask and labels as collators make them: -100 at padding alone."""
    longest = max(row.shape[1] for row in rows)
    padded = []
    for row in rows:
        width = longest - row.shape[1]
        around = (width, 0) if side == "left" else (0, width)
        padded.append([torch.nn.functional.pad(row, around, value=v) for v in (0, -100)])
    ids, labels = (torch.cat([row[part] for row in padded]) for part in (0, 1))
    return ids, (labels != -100).long(), labels


@pytest.mark.parametrize("loss_only", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
@variants
def test_padding_predicts_nothing(variant: str, side: str, loss_only: bool) -> None:
    model = build_model(variant)
    rows = [draw_ids(1, length, seed=length) for length in (9, 5, 2)]
    ids, mask, labels = pad_rows(rows, side)
    alone = [(row.shape[1] - 1) * model(row, labels=row).loss for row in rows]
    found = model(ids, attention_mask=mask, labels=labels, loss_only=loss_only).loss
    assert error(found, sum(alone) / 13) <= 1e-12
    # A divisor that is given stays as it is.
    found = model(
        ids, attention_mask=mask, labels=labels, loss_only=loss_only, num_items_in_batch=20
    ).loss
    assert error(found, sum(alone) / 20) <= 1e-12


@variants
def test_gradients_come_from_real_positions(variant: str) -> None:
    # What hindsight says of the gate is a mean over the batch.
    model = build_model(variant, dropout=0.0, hindsight="none").train()
    rows = [draw_ids(1, length, seed=length) for length in (9, 5)]
    ids, mask, labels = pad_rows(rows, "left")
    together = model(ids, attention_mask=mask, labels=labels, num_items_in_batch=12).loss
    grads = []
    for losses in (
        [model(row, labels=row, num_items_in_batch=12).loss for row in rows],
        [together],
    ):
        model.zero_grad(set_to_none=True)
        sum(losses).backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert error(grads[1][name], grad) <= 1e-9, name


def test_targets_at_padding_do_not_count() -> None:
    model = build_model("core")
    ids, mask, _ = pad_rows([draw_ids(1, 6), draw_ids(1, 4)], "left")
    targets = draw_ids(2, 6, seed=5)
    found = model(ids, attention_mask=mask, shift_labels=targets).loss
    kept = targets.masked_fill(mask == 0, -100)
    assert torch.equal(found, model(ids, attention_mask=mask, shift_labels=kept).loss)
    # The mask may reach back over a cache.
    cache = model(ids, attention_mask=mask).past_key_values
    mask = torch.cat([mask, torch.tensor([[1, 1], [0, 1]])], dim=1)
    new, targets = draw_ids(2, 2, seed=8), draw_ids(2, 2, seed=9)
    given = {"attention_mask": mask, "past_key_values": cache}
    found = model(new, shift_labels=targets, **given).loss
    targets[1, 0] = -100
    assert torch.equal(found, model(new, shift_labels=targets, **given).loss)


def test_the_collator_of_transformers() -> None:
    """It pads on the left, as the tokenizer does, and labels every byte."""
    tokenizer = build_tokenizer()
    model = build_model("core", vocab_size=259, pad_token_id=256)
    texts = ["a longer line of text", "short"]
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    batch = collate([tokenizer(text) for text in texts])
    rows = [torch.tensor([tokenizer(text).input_ids]) for text in texts]
    alone = sum((row.shape[1] - 1) * model(row, labels=row).loss for row in rows)
    expected = alone / sum(row.shape[1] - 1 for row in rows)
    assert error(model(**batch).loss, expected) <= 1e-12
