"""Whoever predicts from hidden states and head alone: TRL exactly, others refused."""

import itertools
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import linear
from trl.trainer.distillation_trainer import _chunked_divergence_loss
from trl.trainer.utils import add_fused_lm_head

from tests.models import build_model
from unimatrix import UniMatrixForCausalLM
from unimatrix.errors import InputError
from unimatrix.hub.split_head import PointedHidden

FIELDS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
# Where the split is true, where votes are added, and where shares are mixed.
WHOLE = ["core", "rosa-assoc", "selective+hindsight-alone"]
POINTED = ["sparsepointer", "selective", "selective+no-automaton", "selective+automaton-alone"]


def build(variant: str, dtype: torch.dtype = torch.float32) -> UniMatrixForCausalLM:
    if variant == "selective+hindsight-alone":
        alone = {"pointer": False, "automaton_pointer": False}
        return build_model("selective+small", dtype=dtype, dropout=0.0, **alone)
    return build_model(variant, dtype=dtype, dropout=0.0)


def draw_ids() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    first = torch.randint(3, 23, (2, 12), generator=generator)
    return torch.cat([first, first], dim=1)


def mask_some(ids: torch.Tensor) -> torch.Tensor:
    return ids.masked_fill(torch.arange(ids.shape[1]) < 9, -100)


def take_gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("num_items", [None, 57])
@pytest.mark.parametrize("variant", [*WHOLE, *POINTED])
def test_the_fused_loss_of_trl_is_our_own(variant, num_items) -> None:
    model = build(variant).train()
    ids = draw_ids()
    given = {"input_ids": ids, "labels": mask_some(ids), "num_items_in_batch": num_items}
    own = model(**given).loss
    expected = take_gradients(model, own)
    add_fused_lm_head(model)
    torch.testing.assert_close(model(**given).loss, own)  # the unfused call stays
    fused = model(**given, fused_lm_head=True)
    torch.testing.assert_close(fused.loss, own)
    found = take_gradients(model, fused.loss)
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-6)
    pointer = [name for name in found if "pointer" in name or "gate_down" in name]
    assert all(found[name].any() for name in pointer)
    assert pointer or variant in ("core", "rosa-assoc")


@pytest.mark.parametrize("variant", [WHOLE[0], *POINTED])
def test_the_fields_are_those_of_the_logits(variant) -> None:
    model, ids = build(variant), draw_ids()
    labels = mask_some(ids)
    add_fused_lm_head(model, temperature=0.7, outputs=FIELDS)
    found = model(input_ids=ids, labels=labels, fused_lm_head=True)
    logits = model(input_ids=ids).logits[:, :-1] / 0.7
    log_vocab = logits.log_softmax(-1)
    expected = {
        "log_probs": log_vocab.gather(-1, ids[:, 1:, None]).squeeze(-1),
        "entropy": torch.distributions.Categorical(logits=logits).entropy(),
        "log_sum_sq_probs": log_vocab.exp().square().sum(-1).log(),
        "mean_logits": logits.mean(-1),
        "is_top1": log_vocab.argmax(-1) == ids[:, 1:],
    }
    mask = labels[:, 1:] != -100
    assert torch.equal(found.label_mask, mask)
    for name, field in expected.items():
        torch.testing.assert_close(found[name], field.masked_fill(~mask, 0), rtol=1e-4, atol=1e-4)


def test_shifted_labels_are_not_shifted_again() -> None:
    model, ids = build("selective"), draw_ids()
    add_fused_lm_head(model)
    found = model(input_ids=ids[:, :-1], shift_labels=ids[:, 1:], fused_lm_head=True).log_probs
    expected = model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_it_holds_under_an_adapter_and_autocast() -> None:
    model, ids = build("selective"), draw_ids()
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    add_fused_lm_head(adapted.get_base_model())
    own = model.forward.__wrapped__(model, input_ids=ids, labels=ids).loss
    fused = adapted(input_ids=ids, labels=ids, fused_lm_head=True).loss
    torch.testing.assert_close(fused, own)
    with torch.autocast("cpu", torch.bfloat16):
        own = model.forward.__wrapped__(model, input_ids=ids, labels=ids).loss
        rounded = adapted(input_ids=ids, labels=ids, fused_lm_head=True).loss
    torch.testing.assert_close(rounded, own, rtol=1e-5, atol=1e-5)


def test_what_a_loss_wants_less_likely_teaches_the_gate_nothing() -> None:
    ids, found = draw_ids(), {}
    for sign, hindsight in itertools.product((1, -1), ("attribution", "none")):
        given = {"dropout": 0.0, "hindsight": hindsight}
        model = build_model("selective+small", dtype=torch.float32, **given).train()
        add_fused_lm_head(model)
        log_probs = model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs
        found[sign, hindsight] = take_gradients(model, -sign * log_probs.mean())
    name = "model.block.selective_mixer.gate_down.weight"
    assert not torch.allclose(found[1, "attribution"][name], found[1, "none"][name])
    torch.testing.assert_close(found[-1, "attribution"], found[-1, "none"])


def test_a_fused_forward_that_is_not_known_is_refused() -> None:
    def forward(self, *, fused_lm_head: bool = False):
        return fused_lm_head

    with pytest.raises(InputError, match=r"install trl==1.16, or train with transformers.Trainer"):
        build("selective").forward = forward
    core = build("core")
    core.forward = forward
    assert core.forward is forward


SPLITS = {
    "head": lambda model, h: model.lm_head(h),
    "function": lambda model, h: linear(h[:, :-1], model.get_output_embeddings().weight),
    "matmul": lambda model, h: h @ model.get_input_embeddings().weight.T,
    "einsum": lambda model, h: torch.einsum("btd,vd->btv", h, model.lm_head.weight),
    "tile": lambda model, h: torch.mm(h.flatten(0, 1)[:5], model.lm_head.weight.T.float()),
    "trl": lambda model, h: _chunked_divergence_loss(
        h, h, *[model.lm_head.weight] * 2, torch.ones(h.shape[:2]), 0.5
    ),
}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("variant", ["core", *POINTED[:2]])
def test_a_product_with_the_head_is_refused_where_it_drops_the_pointer(variant, split) -> None:
    model, ids = build(variant), draw_ids()
    hidden = model.base_model(ids).last_hidden_state
    if variant == "core":
        SPLITS[split](model, hidden)
        torch.testing.assert_close(model.lm_head(hidden), model(input_ids=ids).logits)
        return
    with pytest.raises(InputError, match=r"its pointer is no part of lm_head\. Call the model"):
        SPLITS[split](model, hidden)


def test_hidden_states_are_ordinary_otherwise(tmp_path) -> None:
    model, ids = build("selective").train(), draw_ids()
    hidden = model.get_decoder()(ids).last_hidden_state
    probe = torch.nn.Linear(12, 3)
    loss = probe(hidden[:, -1]).logsumexp(-1).mean()
    assert type(loss) is torch.Tensor
    assert take_gradients(model, loss)
    assert isinstance(hidden.mean(1), PointedHidden)  # of the same width
    model.lm_head(hidden.as_subclass(torch.Tensor))
    file = tmp_path / "features.pt"
    torch.save(hidden, file)
    assert type(torch.load(file, weights_only=True)) is torch.Tensor
    assert type(pickle.loads(pickle.dumps(hidden.detach()))) is torch.Tensor
    compiled = torch.compile(lambda h: probe(h).sum(), backend="eager")
    torch.testing.assert_close(compiled(hidden.detach()), probe(hidden).sum())
