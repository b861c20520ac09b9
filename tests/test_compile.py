"""``torch.compile``: one graph a train step, and the numbers of eager execution."""

import importlib
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.models import build_model, draw_ids
from tests.tolerances import error
from tests.train.small_training import build_dataset, build_settings
from tests.train.small_training import build_model as build_small_model
from unimatrix.kernels.passes.feed_forward_native import prepare_feed_forward
from unimatrix.kernels.passes.head_native import prepare_head
from unimatrix.kernels.passes.mixing_native import prepare_mixing
from unimatrix.kernels.passes.projection_native import prepare_projections
from unimatrix.modeling import UniMatrixForCausalLM
from unimatrix.ops.matrix_state import scan_matrix_state
from unimatrix.ops.selective_slots import empty_selective_slots
from unimatrix.presets import PRESETS
from unimatrix.train import trainer as training
from unimatrix.train.trainer import train_model

# Every preset, and the delta rule with a gate that sees the stream.
CAPTURED = [*PRESETS, "selective+hidden"]
# The guard makes the recurrence nonlinear: it has compiled loops of its own, outside the graph.
GUARDED = [name for name in CAPTURED if name.startswith("discovery")]
UNPADDED = draw_ids(2, 24)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Forget the graphs of other tests: a function may have only so many."""
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def step(model: UniMatrixForCausalLM, run: Any) -> dict[str, torch.Tensor]:
    """Return the loss and all gradients of one step."""
    model.zero_grad()
    loss = run(input_ids=UNPADDED, shift_labels=UNPADDED.roll(-1, 1), loss_only=True).loss
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients}


def make_arguments(op: str) -> tuple[Any, ...]:
    """Return small arguments of an operator; one that is carried lies in memory as it may come."""
    torch.manual_seed(0)
    ids = torch.randint(0, 5, (2, 9))
    if op == "bind_and_scan":
        importlib.import_module("unimatrix.ops.matrix_state.fused_scan_native")  # declares it
        state = torch.randn(2, 3, 8, 8).transpose(2, 3).requires_grad_()
        vectors = torch.randn(2, 9, 4, 3, 8, requires_grad=True)
        return vectors, torch.randn(2, 9, 12, requires_grad=True), state, None, True, True
    if op == "allocate_slots":
        keys, ages = torch.randn(2, 13, 6), torch.zeros(4, 2, dtype=torch.int64).T
        real = torch.ones(2, 9, dtype=torch.bool)
        return keys[:, :9], keys, torch.rand(2, 13), ages, real, real, 3, 0.85, 0.05, "native"
    if op == "scan_selective_slots":
        lengths = torch.full((2,), 9)
        writes = [ids[..., None], ids[..., None], ids, 5 * ids[..., None], 0 * lengths, lengths]
        return writes, list(empty_selective_slots(2, 4, 300)), True, [8, 0, 3], "native"
    x = torch.randn(2, 9, 16, requires_grad=True)
    if op == "project":
        scale = torch.ones(16, requires_grad=True)
        layers = [torch.randn(48, 16)], [torch.randn(5, 16)], [torch.randn(5)]
        weights = prepare_projections(scale, None, 1e-5, torch.randn(3, 16), *layers)
        return x, torch.randn(2, 2, 16), *weights, True
    if op == "add_mixed":
        mixing = prepare_mixing(torch.randn(16, 32), [torch.randn(32, 16)], [torch.randn(32)])
        h, readout = (torch.randn(2, 9, n, requires_grad=True) for n in (16, 32))
        return x, h, readout, torch.randn(2, 9, 16), None, *mixing[:3]
    if op == "add_feed_forward":
        network = prepare_feed_forward(
            torch.ones(16), torch.zeros(16), 1e-5, [torch.randn(20, 16)], torch.randn(20),
            torch.randn(16, 20), torch.randn(16),
        )  # fmt: skip
        return x, *network
    if op == "sum_cross_entropy":
        head = prepare_head(torch.randn(20, 16, requires_grad=True))
        shares = torch.randn(2, 9, 4, requires_grad=True)
        return x, *head[:3], ids, ids[..., None].expand(2, 9, 3), shares, torch.rand(2, 9), -100
    assert op == "match_suffixes"
    return ids, 4


@pytest.mark.parametrize(
    "op",
    [
        "bind_and_scan",
        "allocate_slots",
        "scan_selective_slots",
        "match_suffixes",
        "project",
        "add_mixed",
        "add_feed_forward",
        "sum_cross_entropy",
    ],
)
def test_an_operator_keeps_its_promises(op: str) -> None:
    """Shapes, strides and derivative that are announced are those that come."""
    arguments = make_arguments(op)
    found = torch.library.opcheck(getattr(torch.ops.unimatrix, op), arguments)
    assert set(found.values()) == {"SUCCESS"}


# Passes over whole layers take a width of 16, not of 12.
@pytest.mark.parametrize(
    ("variant", "width"),
    [*((variant, 12) for variant in CAPTURED), ("sparsepointer", 16), ("selective", 16)],
)
def test_a_train_step_is_one_graph_with_the_same_numbers(variant: str, width: int) -> None:
    """Captured and differentiated as for any compiler; what stands behind it is torch's own."""
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "head_dim": 8, "slot_key_size": 16}
    model = build_model(variant, dropout=0.0, num_hidden_layers=2, **(sizes if width == 16 else {}))
    model = model.double().train()
    expected = step(model, model)
    captured = torch.compile(model, backend="aot_eager", fullgraph=variant not in GUARDED)
    found = step(model, captured)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert error(found[name], value) < 1e-9, name


def test_a_loop_over_tokens_is_not_unrolled() -> None:
    """On a GPU the norm guard runs as the reference: a graph would hold every token."""
    q, log_retention = torch.randn(1, 5, 1, 4), torch.zeros(1, 5, 1)

    def run() -> torch.Tensor:
        given = (q, q, q, None, log_retention, None)
        return scan_matrix_state(*given, norm_guard=True, backend="reference")[0]

    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(run, backend="eager", fullgraph=True)()
    torch.compiler.reset()
    assert torch.equal(torch.compile(run, backend="eager")(), run())


@pytest.mark.parametrize("variant", ["core", "discovery", "sparsepointer", "selective"])
def test_a_compiled_model_still_reads_on(variant: str) -> None:
    """Padding and a cache break the graph; nothing else changes."""
    model = build_model(variant).double().eval()
    captured = torch.compile(model, backend="eager")
    mask = torch.ones_like(UNPADDED)
    mask[0, :5] = 0
    with torch.no_grad():
        first = model(UNPADDED, attention_mask=mask, use_cache=True)
        expected = model(UNPADDED[:, :9], past_key_values=first.past_key_values)
        first = captured(UNPADDED, attention_mask=mask, use_cache=True)
        found = captured(UNPADDED[:, :9], past_key_values=first.past_key_values)
    assert error(found.logits, expected.logits) < 1e-9


def test_a_recipe_trains_through_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "_COMPILE_BACKEND", "aot_eager")
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    compiled, eager = (build_small_model(dropout=0.0) for _ in range(2))
    settings = build_settings(steps=4)
    train_model(compiled, build_dataset(16), replace(settings, compile=True), None)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before
    train_model(eager, build_dataset(16), settings, None)
    for (name, found), expected in zip(
        compiled.named_parameters(), eager.parameters(), strict=True
    ):
        assert error(found, expected) < 1e-4, name
