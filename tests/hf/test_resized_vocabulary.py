"""A vocabulary that grows or shrinks: every table with it, and every way of running agrees."""

from pathlib import Path

import pytest
import torch

from tests.byte_models import save_model
from tests.models import SMALL, VARIANTS, build_model, draw_ids
from unimatrix import Decoder, UniMatrixForCausalLM
from unimatrix.errors import InputError
from unimatrix.kernels.step.explain import explain_config
from unimatrix.ops.selective_slots import empty_selective_slots

VOCAB = SMALL["vocab_size"]
GROWN, SHRUNK = VOCAB + 7, VOCAB - 5


def resize(variant: str, num_tokens: int) -> UniMatrixForCausalLM:
    """Return a small model of a variant with another vocabulary, its new rows told apart."""
    model = build_model(variant)
    model.resize_token_embeddings(num_tokens, mean_resizing=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.shape[0] == num_tokens > VOCAB and "embed" in name:
                generator = torch.Generator().manual_seed(len(name))
                parameter[VOCAB:] = 0.5 * torch.randn(parameter[VOCAB:].shape, generator=generator)
    return model


def draw_text(num_tokens: int) -> torch.Tensor:
    """Return ids [2, 24] that repeat, the last of the vocabulary among them."""
    ids = draw_ids(2, 24)
    ids[:, ::4] = num_tokens - 1
    ids[:, 1::4] = num_tokens - 2
    return ids


@pytest.mark.parametrize("num_tokens", [GROWN, SHRUNK])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_every_way_of_running_takes_the_new_ids(variant: str, num_tokens: int) -> None:
    model, ids = resize(variant, num_tokens), draw_text(num_tokens)
    assert model.config.vocab_size == num_tokens
    logits = model(ids).logits
    assert logits.shape == (2, 24, num_tokens)
    if variant in ("rosa", "selective"):  # shorter than the vocabulary: other passes
        torch.testing.assert_close(model(ids[:, :3]).logits, logits[:, :3])
    loss = model(ids, labels=ids, loss_only=True).loss
    torch.testing.assert_close(loss, model(ids, labels=ids).loss)
    written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3)
    following = model(written).logits[:, 23:26].argmax(dim=-1)
    alive = written[0, 24:] != model.config.eos_token_id
    assert torch.equal(written[0, 24:][alive], following[0][alive])
    if explain_config(model.config) is None:
        decoder = Decoder(model, batch_size=2)
        decoded = torch.stack([decoder.step(column.contiguous()) for column in ids.T], dim=1)
        torch.testing.assert_close(decoded, logits)


@pytest.mark.parametrize("variant", ["rosa", "discovery", "sparsepointer"])
def test_old_tokens_keep_their_logits(variant: str) -> None:
    """The new ones add to the sum that every probability is divided by, and nothing else."""
    model, ids = build_model(variant), draw_ids(2, 24)
    with torch.no_grad():
        before = model(ids).logits
        model.resize_token_embeddings(GROWN, mean_resizing=False)
        after = model(ids).logits[..., :VOCAB]
    differences = after.log_softmax(dim=-1) - before.log_softmax(dim=-1)
    torch.testing.assert_close(differences, torch.zeros_like(differences))


@pytest.mark.parametrize("variant", ["core", "rosa", "discovery", "selective"])
@torch.no_grad()
def test_a_resized_model_is_saved_loaded_and_trained(variant: str, tmp_path: Path) -> None:
    model, ids = resize(variant, GROWN).float(), draw_text(GROWN)
    loaded = UniMatrixForCausalLM.from_pretrained(save_model(tmp_path, model)).eval()
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    with torch.enable_grad():
        loaded.train()(ids, labels=ids, loss_only=True).loss.backward()
    for name, parameter in loaded.named_parameters():
        if parameter.shape[0] == GROWN and parameter.requires_grad:
            assert parameter.grad[GROWN - 1].abs().sum() > 0, name


def test_slots_hold_ids_of_the_grown_vocabulary() -> None:
    """A value takes two bytes up to 32,767 tokens."""
    model = build_model("selective+small", dtype=torch.float32)
    model.resize_token_embeddings(40_000, mean_resizing=False)
    ids = torch.tensor([[39_999, 35_000] * 4])
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    held = cache.shared["selective_mixer"].slots.slot_value_ids
    assert held.dtype == empty_selective_slots(1, 1, 40_000).slot_value_ids.dtype == torch.int32
    assert int(held.max()) == 39_999


def test_a_decoder_keeps_the_vocabulary_it_began_with() -> None:
    model = build_model("rosa")
    decoder = Decoder(model)
    model.resize_token_embeddings(GROWN, mean_resizing=False)
    with pytest.raises(InputError, match=rf"token_ids holds \[{VOCAB}\]; pass ids in 0\.\."):
        decoder.step(torch.tensor([VOCAB]))
    assert decoder.step(torch.tensor([VOCAB - 1])).shape == (1, VOCAB)


def test_no_special_token_is_cut_off() -> None:
    model = build_model("rosa", pad_token_id=VOCAB - 1)
    with pytest.raises(InputError, match=f"does not hold pad_token_id {VOCAB - 1}"):
        model.resize_token_embeddings(VOCAB - 2)
    assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == VOCAB


def test_a_table_that_was_replaced_alone_is_not_decoded_compiled() -> None:
    model = build_model("rosa")
    model.lm_head = torch.nn.Linear(SMALL["hidden_size"], GROWN, bias=False, dtype=torch.float64)
    with pytest.raises(InputError, match=f"lm_head has {GROWN} rows and the vocabulary {VOCAB}"):
        Decoder(model)
