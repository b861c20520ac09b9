"""What other code passes to ``forward``: accepted, or refused in one sentence."""

from typing import Any

import pytest
import torch

from tests.models import VARIANTS, build_model, draw_ids
from tests.tolerances import error
from unimatrix.errors import InputError

variants = pytest.mark.parametrize("variant", VARIANTS)
READ_NO_IDS = ["core", "assoc", "assoc-hard", "core+mixed", "core+conv", "assoc+token"]


@variants
def test_lora_on_all_linear_layers_trains(variant: str) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=2)
    model = peft.get_peft_model(build_model(variant, dtype=torch.float32), config)
    ids = draw_ids(2, 12)
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=0.01)
    losses = []
    for _ in range(4):
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@variants
def test_what_is_none_or_false_changes_nothing(variant: str) -> None:
    model, ids = build_model(variant), draw_ids(2, 6)
    logits = model(ids).logits
    nothing: dict[str, Any] = {
        "inputs_embeds": None,
        "position_ids": None,
        "token_type_ids": torch.zeros_like(ids),
        "output_attentions": False,
        "shift_labels": None,
    }
    assert torch.equal(model(ids, **nothing).logits, logits)
    del nothing["shift_labels"]
    assert torch.equal(model.model(ids, **nothing)[0], model.model(ids)[0])


def test_what_has_no_meaning_here_is_refused() -> None:
    model, ids = build_model("core"), draw_ids(2, 6)
    for model_or_base in (model, model.model):
        with pytest.raises(InputError, match="output_attentions=True"):
            model_or_base(ids, output_attentions=True)
        with pytest.raises(InputError, match="token_type_ids has types other than 0"):
            model_or_base(ids, token_type_ids=torch.ones_like(ids))
        with pytest.raises(TypeError, match="unexpected keyword argument 'cache_params'"):
            model_or_base(ids, cache_params=None)


@pytest.mark.parametrize("variant", ["core", "sparsepointer+table"])
def test_positions_that_count_on(variant: str) -> None:
    model, ids = build_model(variant), draw_ids(2, 7)
    counted = torch.arange(7)
    for positions in (counted, counted[None], counted.expand(2, 7), counted.int()):
        assert torch.equal(model(ids, position_ids=positions).logits, model(ids).logits)
    cache = model(ids[:, :3]).past_key_values
    later = model(ids[:, 3:], past_key_values=cache, position_ids=counted[None, 3:]).logits
    assert error(later, model(ids).logits[:, 3:]) < 1e-10
    # Left padding, as transformers' `generate` numbers it.
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    numbered = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    padded = model(ids, attention_mask=mask)
    found = model(ids, attention_mask=mask, position_ids=numbered).logits
    assert torch.equal(found, padded.logits)
    following = draw_ids(2, 1)
    longer = torch.cat([mask, torch.ones(2, 1, dtype=torch.int64)], 1)
    model(
        following,
        attention_mask=longer,
        past_key_values=padded.past_key_values,
        position_ids=(longer.cumsum(-1) - 1)[:, -1:],
    )


@pytest.mark.parametrize("variant", ["core", "sparsepointer+table"])
def test_positions_that_go_on_elsewhere_are_refused(variant: str) -> None:
    model, ids = build_model(variant), draw_ids(2, 6)
    cache = model(ids).past_key_values
    skipping = torch.tensor([0, 1, 2, 4, 5, 6])
    with pytest.raises(InputError, match="does not count the tokens of each row on"):
        model(ids, position_ids=skipping)
    with pytest.raises(InputError, match=r"on from \[6, 6\]"):
        model(ids, past_key_values=cache, position_ids=torch.arange(6))
    with pytest.raises(InputError, match=r"position_ids has shape \[5\]"):
        model(ids, position_ids=torch.arange(5))


def test_where_positions_start_matters_with_a_table() -> None:
    ids, ahead = draw_ids(2, 6), torch.arange(4, 10)
    model = build_model("core")
    assert torch.equal(model(ids, position_ids=ahead).logits, model(ids).logits)
    with pytest.raises(InputError, match=r"on from \[0, 0\]"):
        build_model("sparsepointer+table")(ids, position_ids=ahead)


def test_generate_takes_positions_as_forward_does() -> None:
    model, ids = build_model("core"), draw_ids(2, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    kwargs = {"attention_mask": mask, "max_new_tokens": 3, "do_sample": False}
    numbered = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)
    for use_cache in (True, False):
        expected = model.generate(ids, use_cache=use_cache, **kwargs)
        found = model.generate(ids, use_cache=use_cache, position_ids=numbered, **kwargs)
        assert torch.equal(found, expected)
    with pytest.raises(InputError, match="does not count the tokens of each row on"):
        model.generate(ids, position_ids=torch.tensor([[0, 1, 2, 4, 5, 6]] * 2), **kwargs)


@pytest.mark.parametrize("variant", ["core", "sparsepointer", "selective"])
def test_logits_at_positions_by_number(variant: str) -> None:
    model, ids = build_model(variant), draw_ids(2, 6)
    kept = model(ids, logits_to_keep=torch.tensor([1, 4]), labels=None).logits
    assert torch.equal(kept, model(ids).logits[:, [1, 4]])


@variants
def test_embeddings_instead_of_ids(variant: str) -> None:
    model, ids = build_model(variant), draw_ids(2, 8)
    embeds = model.get_input_embeddings()(ids)
    if variant not in READ_NO_IDS:
        with pytest.raises(InputError, match=r"inputs_embeds .* reads in \w+="):
            model(inputs_embeds=embeds)
        return
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 1, 1, 1, 1]])
    for chosen in (None, mask):
        by_ids = model(ids, attention_mask=chosen, labels=ids)
        by_embeds = model(inputs_embeds=embeds, attention_mask=chosen, labels=ids)
        assert error(by_embeds.logits, by_ids.logits) < 1e-10
        assert error(by_embeds.loss, by_ids.loss) < 1e-10
    # A stream may go on with either.
    first = model(inputs_embeds=embeds[:, :5]).past_key_values
    for rest in ({"input_ids": ids[:, 5:]}, {"inputs_embeds": embeds[:, 5:]}):
        later = model(past_key_values=first, **rest).logits
        assert error(later, model(ids).logits[:, 5:]) < 1e-10


def test_exactly_one_of_ids_and_embeddings() -> None:
    model, ids = build_model("core"), draw_ids(2, 6)
    embeds = model.get_input_embeddings()(ids)
    with pytest.raises(InputError, match="neither was given"):
        model()
    with pytest.raises(InputError, match="both were given"):
        model(ids, inputs_embeds=embeds)
    with pytest.raises(InputError, match=r"inputs_embeds has shape \[6, 12\]"):
        model(inputs_embeds=embeds[0])
    with pytest.raises(InputError, match="inputs_embeds has width 5; this model's is 12"):
        model(inputs_embeds=embeds[..., :5])


def test_prompt_tuning_trains_where_no_ids_are_read() -> None:
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    ids = draw_ids(2, 6)
    model = peft.get_peft_model(build_model("assoc", dtype=torch.float32), config)
    model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
    (prompt,) = (p for p in model.parameters() if p.requires_grad)
    assert prompt.grad is not None
    assert prompt.grad.abs().max() > 0
    model = peft.get_peft_model(build_model("rosa", dtype=torch.float32), config)
    with pytest.raises(InputError, match="residual_path='previous_token'; pass input_ids"):
        model(input_ids=ids, labels=ids)


@variants
def test_hidden_states_lie_on_the_way_to_the_logits(variant: str) -> None:
    """So that their gradients can be asked for, under padding too."""
    model, ids = build_model(variant), draw_ids(2, 7)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]])
    for chosen in (None, mask):
        output = model(ids, attention_mask=chosen, output_hidden_states=True)
        shapes = {tuple(hidden.shape) for hidden in output.hidden_states}
        assert shapes == {(2, 7, model.config.hidden_size)}
        assert error(output.logits, model(ids, attention_mask=chosen).logits) < 1e-10
        for hidden in output.hidden_states:
            hidden.retain_grad()
        output.logits[:, 2:5].sum().backward()
        assert all(h.grad is not None and h.grad.abs().max() > 0 for h in output.hidden_states)


def test_the_configuration_asks_for_outputs() -> None:
    model, ids = build_model("selective"), draw_ids(2, 5)
    asked = model(ids, output_hidden_states=True)
    model.config.output_hidden_states = True
    assert len(model(ids).hidden_states) == len(asked.hidden_states)
    assert len(model.model(ids).hidden_states) == len(asked.hidden_states)
    assert model(ids, output_hidden_states=False).hidden_states is None
    model.config.return_dict = False
    assert isinstance(model(ids), tuple)
    assert isinstance(model.model(ids), tuple)
    assert model(ids, return_dict=True).logits.shape == (2, 5, 23)
    model.config.output_attentions = True
    with pytest.raises(InputError, match="output_attentions=True"):
        model(ids)
    assert isinstance(model(ids, output_attentions=False), tuple)
