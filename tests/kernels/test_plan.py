"""What a plan returns: modules with a reason, or callables that do the same."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.models import VARIANTS, build_model, draw_ids
from tests.tolerances import error, limit
from unimatrix import modeling
from unimatrix.errors import InputError
from unimatrix.kernels.explain import explain_sizes
from unimatrix.kernels.plan import Run, plan, plan_loss
from unimatrix.modeling import UniMatrixForCausalLM
from unimatrix.nn.matrix_mixer import _normalize

# Widths that kernels read; more tokens than the vocabulary has.
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "head_dim": 8,
    "slot_key_size": 16,
}
IDS = draw_ids(2, 40)
PARTS = ("embed", "block", "norm", "pointer", "residual_context", "selective_mixer", "loss")
variants = pytest.mark.parametrize("variant", VARIANTS)


def build(variant: str = "selective", **changes: Any) -> UniMatrixForCausalLM:
    """Return a model whose widths kernels read."""
    own = {key: value for key, value in SIZES.items() if key not in VARIANTS[variant]}
    return build_model(variant, **(own | changes))


def explain(model: UniMatrixForCausalLM, ids: Tensor = IDS) -> dict[str, str]:
    """Return why parts do not run compiled."""
    return plan(model.model, like=ids).reasons


@pytest.fixture
def plan_alone(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None], list[bool]]:
    """Return a function that has one part run compiled, or none, and says whether it did."""

    def choose(part: str | None) -> list[bool]:
        ran: list[bool] = []

        def plan_part(model: Any, *, like: Tensor) -> Run:
            planned = plan(model, like=like)
            model.passes_backend = "reference"
            chosen = plan(model, like=like)
            model.passes_backend = "auto"
            if part in chosen._fields:
                ran.append(getattr(planned, part) is not getattr(chosen, part))
                chosen = chosen._replace(**{part: getattr(planned, part)})
            elif part in chosen.mixers:
                ran.append(planned.mixers[part] is not chosen.mixers[part])
                chosen = chosen._replace(mixers=chosen.mixers | {part: planned.mixers[part]})
            return chosen

        def plan_head(model: Any, *, like: Tensor) -> Any:
            planned = plan_loss(model, like=like)
            ran.extend([planned.weights is not None] if part == "loss" else [])
            return planned if part == "loss" else planned._replace(weights=None)

        monkeypatch.setattr(modeling, "plan", plan_part)
        monkeypatch.setattr(modeling, "plan_loss", plan_head)
        return ran

    return choose


def measure(model: UniMatrixForCausalLM) -> dict[str, Tensor]:
    """Return the loss of two calls, one after the other, and every gradient."""
    model.zero_grad()
    first = model(IDS[:, :20], labels=IDS[:, :20], use_cache=True, loss_only=True)
    second = model(
        IDS[:, 20:], labels=IDS[:, 20:], past_key_values=first.past_key_values, loss_only=True
    )
    (first.loss + 2 * second.loss).backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": (first.loss + second.loss).detach(), **grads}


@variants
def test_every_part_is_its_module_in_value_and_gradient(
    variant: str, plan_alone: Callable[[str | None], list[bool]]
) -> None:
    model = build(variant, dropout=0.0, vocab_size=19).train()
    plan_alone(None)
    expected = measure(model)
    for part in PARTS:
        ran = plan_alone(part)
        actual = measure(model)
        assert actual.keys() == expected.keys()
        for name, tensor in expected.items():
            quantity = "value" if name == "loss" else "grad"
            largest = limit("fused_passes", torch.float64, quantity)
            assert error(actual[name], tensor) < largest, (part, name)
        assert all(ran) == runs_compiled(model, part), part


def runs_compiled(model: UniMatrixForCausalLM, part: str) -> bool:
    """Return whether a part of a model runs compiled; a mixer that is missing counts."""
    if part == "norm":  # torch's own layer norm is one pass
        return model.config.norm_type == "rms_norm"
    mixture = model.model.pointer_mixture
    return part != "pointer" or (mixture is not None and mixture.head_score is None)


def list_passes(variant: str = "selective", **changes: Any) -> list[bool]:
    """Return which parts of a block run compiled: projections, mixing, network; all as one."""
    reasons = explain(build(variant, dtype=torch.float32, **changes))
    if "all parts" in reasons:
        return 4 * [False]
    parts = ("projections", "mixing", "feed_forward", "step")
    return [f"block.{part}" not in reasons for part in parts]


def test_a_block_runs_compiled_where_its_widths_fit() -> None:
    four = [True, True, True, True]
    assert list_passes() == list_passes("core") == list_passes("sparsepointer") == four
    narrow = {"hidden_size": 12, "num_attention_heads": 3, "head_dim": 4, "slot_key_size": 12}
    assert list_passes(**narrow) == 4 * [False]
    # The readout of the next is no multiple of 16.
    assert list_passes(head_dim=6) == [True, False, True, False]
    assert list_passes(intermediate_size=20_000) == [True, True, False, False]
    assert list_passes("core+no-matrix") == [False, False, True, False]
    # These two have scans of their own.
    delta = {"update_rules": "delta", "normalized_keys": True}
    assert list_passes("core", **delta) == [True, True, True, False]
    assert list_passes("core", norm_guard=True) == [True, True, True, False]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert list_passes() == 4 * [False]


def test_a_reason_names_what_stands_in_the_way() -> None:
    model = build(dtype=torch.float32)
    assert explain(model, IDS[:1, :5]) == {"all parts": "5 positions are fewer than 17"}
    assert explain(build(dtype=torch.bfloat16)) == {"all parts": "the model is bfloat16 on cpu"}
    assert explain(model.to("meta")) == {"all parts": "the model is float32 on meta"}
    model = build(dtype=torch.float32)
    model.set_backend("reference")
    assert explain(model) == {"all parts": "the back end 'reference' was chosen"}
    model.set_backend("auto")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert explain(model) == {"all parts": "autocast is on"}
    assert "all parts" not in explain(model)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.embed_tokens", "embed_tokens"),
        ("model.norm", "norm"),
        ("model.block", "block"),
        ("model.block.norm", "block.projections"),
        ("model.block.matrix_mixer", "block.projections"),
        ("model.block.matrix_mixer", "block.mixing"),
        ("model.block.matrix_mixer.q_proj", "block.projections"),
        ("model.block.matrix_mixer.short_conv", "block.projections"),
        ("model.block.matrix_mixer.out_proj", "block.mixing"),
        ("model.block.selective_mixer.read_gate", "block.mixing"),
        ("model.block.context_gate", "block.mixing"),
        ("model.block.ffn_norm", "block.feed_forward"),
        ("model.block.feed_forward", "block.feed_forward"),
        ("model.block.feed_forward.down_proj", "block.feed_forward"),
        ("model.block.selective_mixer", "selective_mixer"),
        ("model.block.selective_mixer.gate_up", "selective_mixer"),
        ("model.residual_context", "residual_context"),
        ("model.residual_context.embed", "residual_context.embed"),
        ("model.pointer_mixture.slot_score", "pointer_mixture"),
    ],
)
def test_a_hooked_module_is_called(name: str, part: str) -> None:
    model = build(dtype=torch.float32)
    before = explain(model)
    assert part not in before
    calls: list[int] = []
    hook = model.get_submodule(name).register_forward_hook(lambda *_: calls.append(1))
    assert "has a hook" in explain(model)[part]
    model(IDS, labels=IDS)
    assert calls
    hook.remove()
    assert explain(model) == before


def test_what_is_more_than_a_block_is_called() -> None:
    model = build(dtype=torch.float32)
    assert "block" not in explain(model)
    model.model.block.forward = model.model.block.forward
    assert explain(model)["block"] == "block has a forward of its own"
    del model.model.block.forward
    model.gradient_checkpointing_enable()
    assert "block" not in explain(model)
    model.train()
    assert explain(model)["block"] == "block is computed again in the backward pass"
    wrapped = build(dtype=torch.float32)
    wrapped.model.block.__class__ = type("Wrapped", (type(wrapped.model.block),), {})
    assert explain(wrapped)["block"] == "block is a Wrapped"


def test_dropout_is_left_to_its_module() -> None:
    model = build(dtype=torch.float32, dropout=0.1)
    assert "block.step" not in explain(model)
    reasons = explain(model.train())
    assert reasons["block.mixing"] == reasons["block.feed_forward"] == "dropout is on"
    assert reasons["block.step"] == "mixing is no pass"
    assert "block.projections" not in reasons


def test_a_layer_of_another_class_is_called() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = build(dtype=torch.float32)
    model.model.block.matrix_mixer.q_proj = Doubled(16, 16, bias=False)
    reason = "block.matrix_mixer.q_proj is a Doubled"
    assert explain(model)["block.projections"] == reason


def test_passes_asked_for_by_name_run_or_raise() -> None:
    model = build(dtype=torch.float32)
    model.set_backend({"fused_passes": "native"})
    assert "all parts" not in explain(model, IDS[:1, :5])
    with pytest.raises(InputError, match="takes float32 or float64 on the CPU, not bfloat16"):
        explain(model.bfloat16())


def test_the_loss_is_one_pass_with_the_head() -> None:
    model, h = build(dtype=torch.float32), torch.zeros(2, 40, 16)
    assert plan_loss(model, like=h).reason is None
    assert plan_loss(model, like=h[0, :5]).reason == "5 positions are fewer than 17"
    model.lm_head.register_forward_hook(lambda *_: None)
    assert plan_loss(model, like=h).reason == "lm_head has a hook"
    model.set_backend("reference")
    assert plan_loss(model, like=h).reason == "the back end 'reference' was chosen"


def test_sizes_that_a_pass_does_not_take() -> None:
    x = torch.zeros(40, 16)
    assert explain_sizes("it", [x], 640, (16, 32)) is None
    assert explain_sizes("it", [x], 640, (16, 20)) == "it has a width of 20, no multiple of 16"
    assert explain_sizes("it", [x], 639, (16,)) == "it has 640 weights, more than 639"


def test_what_else_stands_in_the_way_of_a_module() -> None:
    model = build(dtype=torch.float32)
    hook = model.model.block.register_full_backward_pre_hook(lambda *_: None)
    assert explain(model)["block"] == "block has a hook"
    hook.remove()
    model.model.block.feed_forward = nn.Sequential(nn.Linear(16, 16))
    assert explain(model)["block.feed_forward"] == "block.feed_forward is a Sequential"
    model(IDS, labels=IDS, loss_only=True).loss.backward()
    model.model.norm._compiled_call_impl = lambda x: x  # as ``Module.compile`` sets it
    assert explain(model)["norm"] == "norm is compiled by torch"


def test_vectors_of_16_bits_stay_so_under_autocast() -> None:
    vectors = torch.randn(2, 9, 3, 8).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        units = _normalize(vectors)
    assert units.dtype == torch.bfloat16
    torch.testing.assert_close(units.float().norm(dim=-1), torch.ones(2, 9, 3), rtol=0, atol=0.02)
