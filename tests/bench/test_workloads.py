"""What is timed does what it says."""

import threading
from dataclasses import replace

import pytest
import torch
from torch import nn

from unimatrix.bench.models import BenchModel
from unimatrix.bench.workloads import (
    MODES,
    NEW_TOKENS,
    BatchLoader,
    choose_batch_size,
    cut_rows,
    load_text,
    prefill,
)
from unimatrix.errors import InputError
from unimatrix.evaluation.footprint import count_cache_bytes
from unimatrix.ops.suffix_automaton import predict_from_suffix
from unimatrix.train.trainer import choose_collator

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8}
NAMES = ("sparsepointer", "unimatrix", "llama", "mamba2", "rwkv")


def build(name: str, **overrides):
    fields = SMALL | ({"intermediate_size": 16} if name == "unimatrix" else {}) | overrides
    spec = BenchModel(name=name, overrides=fields)
    return spec, spec.build(max_tokens=128, seed=0, device="cpu")


def draw_ids(batch: int, num_tokens: int) -> torch.Tensor:
    return cut_rows(b"a stone, a stick, " * 20, batch, num_tokens, 259)


@pytest.mark.parametrize("name", NAMES)
def test_a_train_step_changes_the_weights(name: str) -> None:
    spec, model = build(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    workload = MODES["train"].build(spec, model, draw_ids(2, 9))
    workload.run(workload.prepare())
    assert model.training
    changed = [key for key, value in model.state_dict().items() if not value.equal(before[key])]
    assert any("embed" in key for key in changed)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_train_step_sees_the_objective_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, model = build("selective")
    seen = []
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda **options: seen.append(options) or forward(**options)
    )
    workload = MODES["train"].build(spec, model, draw_ids(2, 9))
    workload.run(workload.prepare())
    assert seen[0]["input_ids"].shape == (2, 8)
    assert seen[0]["loss_only"]
    assert spec.describe_training() == "cross entropy, hindsight by attribution, 64 slots"
    assert BenchModel(name="core").describe_training() == "cross entropy"


@pytest.mark.parametrize("name", ["unimatrix", "llama"])
@pytest.mark.parametrize("mode", list(MODES))
def test_products_are_made_in_the_precision(
    mode: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, model = build(name)
    for precision in ("float32", "bfloat16"):
        seen = set()
        workload = MODES[mode].build(replace(spec, precision=precision), model, draw_ids(1, 9))
        with monkeypatch.context() as patched:
            patched.setattr(nn.Linear, "forward", watch_products(seen))
            workload.run(workload.prepare())
        # In float32 ours decodes and steps without a layer's call, and so does a train step.
        assert seen <= {getattr(torch, precision)}
        assert seen or (name, precision) == ("unimatrix", "float32")
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def watch_products(seen: set[torch.dtype]):
    """Return a layer's forward pass that notes the dtype of its products."""

    def forward(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        made = nn.functional.linear(x, layer.weight, layer.bias)
        seen.add(made.dtype)
        return made

    return forward


def test_a_loader_runs_the_automaton_while_the_step_before_runs() -> None:
    _, model = build("selective")
    ids, made = draw_ids(2, 9), []
    collate = choose_collator(model, "cuda")

    def watch(items):
        made.append(threading.current_thread())
        return collate(items)

    loader = BatchLoader(watch, ids)
    first = loader.take()
    loader.wait()
    assert len(made) == 2
    assert threading.main_thread() not in made
    expected, _ = predict_from_suffix(ids)
    assert first.keys() == {"suffix_match"}
    assert torch.equal(first["suffix_match"], torch.stack(expected, dim=-1))
    assert torch.equal(loader.take()["suffix_match"], first["suffix_match"])
    assert BatchLoader(choose_collator(build("llama")[1], "cuda"), ids).take() == {}


@pytest.mark.parametrize("name", NAMES)
def test_decoding_continues_the_prompt_as_without_a_cache(name: str) -> None:
    spec, model = build(name)
    ids = draw_ids(1, 12)
    workload = MODES["decode"].build(spec, model, ids)
    seen = []
    hook = model.register_forward_pre_hook(
        lambda _, args, given: seen.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    written = workload.run(workload.prepare())
    hook.remove()
    # Some configurations say use_cache=False, which would read everything again for every token.
    assert seen == [1] * NEW_TOKENS
    assert written.shape == (1, NEW_TOKENS)
    # A second run starts from the same cache.
    assert workload.run(workload.prepare()).equal(written)
    with torch.no_grad():
        whole = torch.cat([ids, written[:, :-1]], dim=1)
        logits = model(input_ids=whole, use_cache=False).logits[0, 11:]
    chosen = logits.gather(-1, written[0].unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(chosen, logits.max(dim=-1).values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", ["forward", "prefill", "step"])
def test_other_modes_run_twice(mode: str, name: str) -> None:
    spec, model = build(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    workload = MODES[mode].build(spec, model, draw_ids(1, 9))
    for _ in range(2):
        workload.run(workload.prepare())
    assert not model.training
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())


def test_caches_are_counted_whole() -> None:
    spec, model = build("llama")
    carried = prefill(spec, model.eval(), draw_ids(1, 11))
    assert count_cache_bytes(carried) == 2 * 2 * 10 * 16 * 4  # keys and values, L, T, D, float32
    spec, model = build("sparsepointer")
    carried = prefill(spec, model.eval(), draw_ids(1, 11))
    assert count_cache_bytes(carried) == carried.num_bytes()
    assert count_cache_bytes({"a": [torch.zeros(3)], "b": None}) == 12


def test_batches_fill_what_keeps_a_device_busy() -> None:
    assert choose_batch_size("train", 128, None, "cpu") == 16
    assert choose_batch_size("train", 16_384, None, "cpu") == 1
    assert choose_batch_size("train", 16_384, None, "cuda") == 4
    assert choose_batch_size("forward", 128, 3, "cuda") == 3
    assert choose_batch_size("decode", 128, 3, "cpu") == 1


def test_text_is_real_and_repeats() -> None:
    text = load_text(1000)
    assert len(text) == 1000
    assert len(set(text)) > 20
    assert cut_rows(bytes(range(200, 208)), 2, 4, 203).tolist() == [
        [200, 201, 202, 0],
        [1, 2, 3, 4],
    ]


def test_models_that_cannot_be() -> None:
    with pytest.raises(InputError, match="Did you mean 'core'"):
        BenchModel(name="cores").make_config()
    short = BenchModel(name="core", overrides={"max_position_embeddings": 64})
    assert short.explain_absence(65, "cpu") == "its position table has 64 rows"
    assert short.explain_absence(64, "cpu") is None
    assert "CUDA" in str(BenchModel(name="gla").explain_absence(64, "cpu"))
