"""The models behave like any other of transformers."""

import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import unimatrix
from tests.models import VARIANTS, build_model, draw_ids
from tests.tolerances import error, limit
from unimatrix import UniMatrixForCausalLM  # registers the Auto classes
from unimatrix.configuration import UniMatrixConfig, list_config_fields
from unimatrix.errors import InputError

variants = pytest.mark.parametrize("variant", VARIANTS)
GREEDY = {"max_new_tokens": 8, "do_sample": False}

PARAMETER_COUNTS = {
    ("core", 259): 83_140,
    ("rosa", 259): 103_876,
    ("discovery", 259): 115_184,
    ("assoc", 259): 99_588,
    ("rosa-assoc", 259): 120_324,
    ("discovery-assoc", 259): 131_632,
    ("sparsepointer", 259): 87_494,
    ("core", 64): 70_660,
    ("rosa", 64): 78_916,
    ("discovery", 64): 83_984,
    ("assoc", 64): 87_108,
    ("sparsepointer", 64): 75_014,
}


@pytest.mark.parametrize(("preset", "vocab_size"), PARAMETER_COUNTS)
def test_published_parameter_counts(preset: str, vocab_size: int) -> None:
    config = UniMatrixConfig.preset(preset, vocab_size=vocab_size, pad_token_id=0)
    assert UniMatrixForCausalLM(config).num_parameters() == PARAMETER_COUNTS[preset, vocab_size]


def test_bare_config_is_core_at_the_published_size() -> None:
    fields = list_config_fields()
    bare, core = UniMatrixConfig(), UniMatrixConfig.preset("core")
    assert {f: getattr(bare, f) for f in fields} == {f: getattr(core, f) for f in fields}
    assert (bare.hidden_size, bare.num_hidden_layers, bare.vocab_size) == (64, 3, 259)


@variants
def test_save_and_load(variant: str, tmp_path) -> None:
    model = build_model(variant, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    ids = draw_ids(2, 9)
    for auto in (AutoModelForCausalLM, UniMatrixForCausalLM):
        loaded = auto.from_pretrained(tmp_path)
        assert type(loaded) is UniMatrixForCausalLM
        # Weights mapped from a file lie at odd addresses, where a vectorised sum may round its last
        # bit otherwise; in tensors of their own they give the same logits bit for bit.
        copied = UniMatrixForCausalLM(loaded.config).eval()
        copied.load_state_dict(loaded.state_dict())
        assert torch.equal(copied(ids).logits, model(ids).logits)
        assert error(loaded(ids).logits, model(ids).logits) <= 1e-6
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    fields = list_config_fields()
    config = AutoConfig.from_pretrained(tmp_path)
    assert {f: getattr(config, f) for f in fields} == {f: getattr(model.config, f) for f in fields}
    base = AutoModel.from_pretrained(tmp_path)
    found = error(base(ids).last_hidden_state, model.model(ids).last_hidden_state)
    assert found <= 1e-6


def test_initial_scale() -> None:
    torch.manual_seed(0)
    model = UniMatrixForCausalLM(UniMatrixConfig.preset("discovery-assoc"))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert torch.equal(parameter, torch.full_like(parameter, float("weight" in name)))
        elif name.endswith("bias"):
            assert not parameter.any(), name
        else:
            assert abs(parameter.std().item() - 0.02) < 0.004, name


def test_parameters_that_start_elsewhere(tmp_path) -> None:
    """transformers passes modules over that have no parameters of their own."""
    config = UniMatrixConfig.preset("selective", longest_retention=512)
    model = UniMatrixForCausalLM(config)
    block = model.model.block
    retention = torch.sigmoid(block.matrix_mixer.retention_proj.bias)
    assert torch.allclose(1 / (1 - retention), torch.tensor([2.0, 12.7, 80.63, 512.0]), rtol=1e-3)
    assert torch.equal(block.selective_mixer.read_score, torch.tensor([4.0]))
    assert 0.8 < block.matrix_mixer.short_conv.weight[-1].mean() < 1.2
    # What is loaded stays as it was saved.
    block.matrix_mixer.retention_proj.bias.data.fill_(0.25)
    model.save_pretrained(tmp_path)
    loaded = UniMatrixForCausalLM.from_pretrained(tmp_path)
    assert (loaded.model.block.matrix_mixer.retention_proj.bias == 0.25).all()


@variants
def test_generation_with_and_without_cache(variant: str) -> None:
    model = build_model(variant)
    ids = draw_ids(2, 7)
    cached = model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)
    uncached = model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=False, **GREEDY)
    assert torch.equal(cached, uncached)


@variants
def test_left_padded_generation(variant: str) -> None:
    model = build_model(variant)
    short, long = draw_ids(1, 4, seed=1), draw_ids(1, 9, seed=2)
    batch = torch.cat([torch.cat([torch.zeros(1, 5, dtype=torch.int64), short], 1), long])
    mask = torch.ones_like(batch)
    mask[0, :5] = 0
    together = model.generate(batch, attention_mask=mask, **GREEDY)[:, 9:]
    for row, prompt in enumerate((short, long)):
        alone = model.generate(prompt, attention_mask=torch.ones_like(prompt), **GREEDY)
        expected = alone[0, prompt.shape[1] :]
        assert torch.equal(together[row, : expected.shape[0]], expected)


@variants
def test_beams_equal_uncached_beams(variant: str) -> None:
    model = build_model(variant)
    ids = draw_ids(2, 6)
    kwargs = {
        "attention_mask": torch.ones_like(ids),
        "num_beams": 3,
        "max_new_tokens": 6,
        "do_sample": False,
    }
    assert torch.equal(
        model.generate(ids, **kwargs), model.generate(ids, use_cache=False, **kwargs)
    )


def test_generation_continues_a_cache() -> None:
    model = build_model("sparsepointer")
    ids = draw_ids(1, 10)
    cache = model(ids[:, :6], use_cache=True).past_key_values
    mask = torch.ones_like(ids)
    continued = model.generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY)
    assert torch.equal(continued, model.generate(ids, attention_mask=mask, **GREEDY))
    with pytest.raises(InputError, match="at least one new token"):
        model.generate(ids[:, :6], attention_mask=mask[:, :6], past_key_values=cache, **GREEDY)


def test_samplers_are_seeded() -> None:
    model = build_model("sparsepointer")
    ids = draw_ids(1, 6)
    kwargs = {
        "attention_mask": torch.ones_like(ids),
        "do_sample": True,
        "max_new_tokens": 12,
        "temperature": 0.8,
        "top_p": 0.9,
        "top_k": 5,
        "repetition_penalty": 1.1,
    }
    torch.manual_seed(3)
    first = model.generate(ids, **kwargs)
    torch.manual_seed(3)
    assert torch.equal(model.generate(ids, **kwargs), first)


def test_assisted_generation_is_refused() -> None:
    model = build_model("core")
    ids = draw_ids(1, 6)
    with pytest.raises(ValueError, match="stateful"):
        model.generate(ids, assistant_model=build_model("core"), **GREEDY)


def test_hidden_states() -> None:
    model = build_model("discovery")
    ids = draw_ids(2, 7)
    output = model(ids, output_hidden_states=True)
    assert len(output.hidden_states) == model.config.num_hidden_layers + 1
    assert torch.equal(output.hidden_states[0], model.model.embed_tokens(ids))
    assert torch.equal(model.lm_head(output.hidden_states[-1]), output.logits)


def test_loss_conventions() -> None:
    model = build_model("core")
    ids = draw_ids(2, 8)
    labels = ids.clone()
    labels[:, :4] = -100
    output = model(ids, labels=labels)
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    expected = torch.nn.functional.cross_entropy(
        output.logits.flatten(0, 1), shifted.flatten(), ignore_index=-100
    )
    assert torch.equal(output.loss, expected)
    assert torch.equal(model(ids, shift_labels=shifted).loss, expected)
    summed = model(ids, labels=labels, num_items_in_batch=16).loss
    assert error(summed, expected * 8 / 16) < 1e-12
    assert model(ids, logits_to_keep=2).logits.shape == (2, 2, 23)
    assert torch.equal(model(ids, logits_to_keep=2).logits, output.logits[:, -2:])
    assert model(ids, labels=labels, return_dict=False)[0].shape == ()


def draw_few_labels(ids: torch.Tensor) -> torch.Tensor:
    """Return targets at a fifth of the positions, and one row with none."""
    generator = torch.Generator().manual_seed(7)
    targets = torch.randint(3, 12, ids.shape, generator=generator)
    asked = torch.rand(ids.shape, generator=generator) < 0.2
    asked[0, 3], asked[1] = True, False
    return targets.masked_fill(~asked, -100)


@pytest.mark.parametrize("weighs", [False, True])
@pytest.mark.parametrize("num_items", [None, 64])
@pytest.mark.parametrize("training", [False, True])
@variants
def test_loss_alone_is_the_loss(
    variant: str, training: bool, num_items: int | None, weighs: bool
) -> None:
    """The same loss and gradients, the gate's among them, without the other positions' logits."""
    model = build_model(variant, dropout=0.0).train(training)
    ids = draw_ids(3, 24)
    targets = draw_few_labels(ids)
    weights = torch.rand(ids.shape, dtype=model.dtype) if weighs else None
    options = {"shift_labels": targets, "loss_weights": weights, "num_items_in_batch": num_items}
    losses, grads, logits = [], [], None
    for loss_only in (False, True):
        model.zero_grad(set_to_none=True)
        output = model(ids, **options, loss_only=loss_only)
        assert (output.logits is None) == loss_only
        output.loss.backward()
        losses.append(output.loss.detach())
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        logits = output.logits.detach() if output.logits is not None else logits
    assert error(losses[1], losses[0]) <= 1e-12
    counts = (targets >= 0) * (1.0 if weights is None else weights)
    nats = torch.nn.functional.cross_entropy(logits.mT, targets, reduction="none")
    expected = (nats * counts).sum() / (counts.sum() if num_items is None else num_items)
    assert error(losses[0], expected) <= 1e-12
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert error(grads[1][name], grad) <= limit("golden", torch.float64, "grad"), name


@variants
def test_loss_alone_under_left_padding_and_with_unshifted_labels(variant: str) -> None:
    model = build_model(variant)
    ids = draw_ids(2, 16)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, 8:14] = -100
    whole, alone = (
        model(ids, attention_mask=mask, labels=labels, loss_only=loss_only)
        for loss_only in (False, True)
    )
    assert error(alone.loss, whole.loss) <= 1e-12
    # Without labels there is no loss to be alone.
    logits = model(ids, attention_mask=mask, loss_only=True).logits
    assert torch.equal(logits, whole.logits)


@variants
def test_logits_at_chosen_positions(variant: str) -> None:
    model = build_model(variant)
    ids = draw_ids(3, 20)
    whole = model(ids).logits
    chosen = draw_few_labels(ids) != -100
    found = model(ids, logits_at=chosen, logits_to_keep=1).logits
    assert found.shape == (int(chosen.sum()), 23)
    assert error(found, whole[chosen]) <= limit("model", torch.float64, "value")
    assert torch.equal(found.argmax(-1), whole[chosen].argmax(-1))
    nothing = model(ids, logits_at=torch.zeros_like(chosen)).logits
    assert nothing.shape == (0, 23)


def test_position_table_bounds_the_length() -> None:
    model = build_model("core", max_position_embeddings=8)
    model(draw_ids(1, 8))
    with pytest.raises(InputError, match="max_position_embeddings=None"):
        model(draw_ids(1, 9))
    cache = model(draw_ids(1, 6)).past_key_values
    with pytest.raises(InputError, match="reaches 9 tokens"):
        model(draw_ids(1, 3), past_key_values=cache)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.int64), draw_ids(1, 8)], dim=1)
    mask = torch.tensor([[0] * 4 + [1] * 8])
    assert (
        error(model(padded, attention_mask=mask).logits[:, 4:], model(draw_ids(1, 8)).logits)
        < 1e-12
    )


def test_bad_inputs_say_what_to_do() -> None:
    with pytest.raises(InputError, match="Did you mean 'hidden_size'"):
        UniMatrixConfig(hiden_size=3)
    with pytest.raises(InputError, match="Did you mean 'sparsepointer'"):
        UniMatrixConfig.preset("sparse-pointer")
    with pytest.raises(InputError, match="residual_path"):
        UniMatrixConfig(residual_path="suffix")
    with pytest.raises(InputError, match="identity_lookup"):
        UniMatrixConfig(identity_lookup=True, slot_key_size=3)
    with pytest.raises(InputError, match="upgrade"):
        UniMatrixConfig(format_version=99)
    model = build_model("core")
    with pytest.raises(InputError, match="at least one token"):
        model(torch.zeros(1, 0, dtype=torch.int64))
    with pytest.raises(InputError, match="attention_mask"):
        model(draw_ids(2, 4), attention_mask=torch.ones(2, 3))
    cache = model(draw_ids(2, 4)).past_key_values
    with pytest.raises(InputError, match="2 rows"):
        model(draw_ids(3, 4), past_key_values=cache)
    with pytest.raises(InputError, match="another configuration"):
        build_model("rosa")(draw_ids(2, 4), past_key_values=cache)
    with pytest.raises(InputError, match="not available"):
        model.set_backend("cuda")


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"associative_memory": "selectiv"}, "Did you mean 'selective'"),
        ({"norm_type": "rms"}, "norm_type is 'rms'; choose one of layer_norm, rms_norm"),
        ({"feed_forward_type": "swish"}, "Did you mean 'swiglu'"),
        ({"repeated_key": "newest"}, "repeated_key is 'newest'; choose one of last, first"),
        ({"hindsight": "atribution"}, "Did you mean 'attribution'"),
        ({"hindsight_share": -0.1}, "hindsight_share is -0.1; it must be at least 0"),
        ({"hindsight_floor": float("nan")}, "hindsight_floor is nan"),
        ({"hindsight_weight": -1.0}, "hindsight_weight is -1.0"),
        ({"slot_margin": -1.0}, "slot_margin is -1.0"),
        ({"slot_fade_tokens": 0}, "slot_fade_tokens is 0; it must be a whole number of at least 1"),
        ({"longest_retention": 0}, "longest_retention is 0"),
        ({"slot_key_patterns": []}, "slot_key_patterns is empty"),
        ({"slot_key_patterns": [[]]}, "needs at least one distance, none twice"),
        ({"slot_key_patterns": [[0, 1, 0]]}, "needs at least one distance, none twice"),
        ({"slot_key_patterns": [0, 1]}, "slot_key_patterns holds 0; it needs lists"),
        ({"slot_key_patterns": [[-1]]}, "slot_key_patterns is -1; it must be a whole number"),
        ({"slot_read_offsets": []}, "slot_read_offsets holds"),
        ({"slot_read_offsets": [1.5]}, "slot_read_offsets is 1.5"),
        ({"num_slots": 0}, "num_slots is 0"),
        ({"slot_source": "hidden", "num_hidden_layers": 1}, "must be at least 2, not 1"),
        (
            {"associative_memory": "dense"},
            "pointer=True needs associative_memory='slots', 'selective' or",
        ),
        ({"residual_path": "none"}, "automaton_pointer=True needs residual_path='suffix_automaton"),
    ],
)
def test_unusable_selective_fields_say_what_to_do(fields: dict[str, object], named: str) -> None:
    with pytest.raises(InputError) as caught:
        UniMatrixConfig.preset("selective", **fields)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_norm_guard_has_no_parallel_form() -> None:
    model = build_model("discovery")
    model.set_backend({"matrix_state": "parallel"})
    with pytest.raises(InputError, match="norm_guard"):
        model(draw_ids(1, 4))


@variants
def test_every_linear_is_called(variant: str) -> None:
    """LoRA and quantisation replace Linear modules; one that is bypassed would never train."""
    model = build_model(variant)
    called: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda *_, name=name: called.add(name))
    model(draw_ids(1, 6))
    linear = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    unused = (
        set() if model.config.update_rules == "mixed" else {"model.block.matrix_mixer.diag_proj"}
    )
    assert linear - called == unused & linear


def test_unused_diagonal_is_frozen() -> None:
    model = UniMatrixForCausalLM(UniMatrixConfig())
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"model.block.matrix_mixer.diag_proj.weight"}


def test_lora_trains() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        build_model("sparsepointer+hidden", dtype=torch.float32),
        peft.LoraConfig(target_modules=["q_proj", "out_proj", "up_proj", "query_proj"], r=2),
    )
    ids = draw_ids(2, 12)
    model(input_ids=ids, labels=ids).loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if "lora_B" in n}
    assert len(grads) == 4
    assert all(grad is not None and grad.abs().max() > 0 for grad in grads.values())


def test_lora_around_the_token_embedding_and_the_gate_trains() -> None:
    peft = pytest.importorskip("peft")
    model = build_model("selective", dtype=torch.float32, tie_word_embeddings=False)
    targets = ["embed_tokens", "gate_up", "value_proj"]
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, r=2))
    ids = draw_ids(2, 24)
    wrapped(input_ids=ids, labels=ids).loss.backward()
    grads = [p.grad for n, p in wrapped.named_parameters() if "lora" in n and "_B" in n]
    assert len(grads) == 3
    assert all(grad is not None for grad in grads)


def test_names_load_lazily() -> None:
    code = (
        "import sys, unimatrix; heavy = {'torch', 'transformers', 'numba'} & set(sys.modules);"
        "assert not heavy, heavy; assert 'UniMatrixConfig' in dir(unimatrix);"
        "unimatrix.UniMatrixConfig; from transformers import AutoModelForCausalLM, AutoConfig;"
        "AutoModelForCausalLM.from_config(AutoConfig.for_model('unimatrix'))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute"):
        unimatrix.absent  # noqa: B018


def test_weights_of_the_loss_are_checked() -> None:
    model, ids = build_model("core"), draw_ids(2, 6)
    weights = torch.ones(2, 6, dtype=model.dtype)
    with pytest.raises(InputError, match="loss_weights are given without labels"):
        model(ids, loss_weights=weights)
    with pytest.raises(InputError, match=r"loss_weights has shape \[2, 5\]; pass \[2, 6\]"):
        model(ids, labels=ids, loss_weights=weights[:, 1:])


def test_logits_at_beside_labels_is_refused() -> None:
    model, ids = build_model("selective+small"), draw_ids(1, 6)
    with pytest.raises(InputError, match="logits_at"):
        model(ids, labels=ids, logits_at=torch.ones_like(ids, dtype=torch.bool))
