"""The arithmetic floor against torch's own counter, where that can see the operations."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from unimatrix.bench.arithmetic import FLOPS_PER_MULTIPLY_ADD, TokenCost, count_model
from unimatrix.bench.models import BenchModel
from unimatrix.bench.peers import TIMED_PEERS
from unimatrix.modeling import UniMatrixForCausalLM
from unimatrix.nn.indexed_attention import IndexedAttention
from unimatrix.presets import PRESETS

B, T = 2, 12
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8}
INDEXED = {"associative_memory": "indexed", "index_head_dim": 8}
NAMES = [
    *PRESETS,
    "unimatrix",
    *(name for name, peer in TIMED_PEERS.items() if not peer.needs),
]


def build(name: str):
    # The presets with dense memory have a key size of their own.
    overrides = SMALL | ({"slot_key_size": 8} if "assoc" in name else {})
    name, _, is_indexed = name.partition("+")
    overrides |= INDEXED if is_indexed else {}
    return BenchModel(name=name, overrides=overrides).build(max_tokens=T, seed=0, device="cpu")


def count_flops(model, *, backward: bool, **options) -> dict[str, int]:
    """Return what the counter saw by operation."""
    ids = torch.randint(0, 256, (B, T), generator=torch.Generator().manual_seed(0))
    if isinstance(model, UniMatrixForCausalLM):
        model.set_backend({"fused_passes": "reference"})  # products that torch sees
    with FlopCounterMode(display=False) as counter:
        output = model(input_ids=ids, labels=ids, use_cache=False, **options)
        if backward:
            output.loss.backward()
    return {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}


def make_no_keys(mixer: IndexedAttention, seen: torch.Tensor) -> torch.Tensor:
    return seen.new_zeros(*seen.shape[:-1], mixer.num_heads, mixer.inner // mixer.num_heads)


def count_projections(flops: dict[str, int]) -> int:
    return flops.get("aten.mm", 0) + flops.get("aten.addmm", 0)


@pytest.mark.parametrize("name", NAMES)
def test_projections_forward_and_backward(name: str, monkeypatch) -> None:
    # How many keys are made depends on what the text repeats.
    monkeypatch.setattr(IndexedAttention, "_finish_keys", make_no_keys)
    model = build(name)
    cost = count_model(name.partition("+")[0], model)
    once = FLOPS_PER_MULTIPLY_ADD * B * T * (cost.linear + cost.head)
    assert count_projections(count_flops(model, backward=False)) == once
    assert count_projections(count_flops(model, backward=True)) == 3 * once


def test_a_counter_runs_over_passes_that_it_does_not_see() -> None:
    model = build("core")
    ids = torch.zeros(2, 20, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert model.model.block.feed_forward.up_proj.weight.grad is not None
    assert counter.get_total_flops() > 0


def test_reading_a_matrix_state_is_a_third_of_its_recurrence() -> None:
    model = build("core")
    model.set_backend("reference")
    cost = count_model("core", model)
    flops = count_flops(model, backward=False)
    assert flops["aten.bmm"] == FLOPS_PER_MULTIPLY_ADD * B * T * cost.mixing // 3


def test_attention_and_dense_memory_count_earlier_tokens_only() -> None:
    llama = build("llama")
    llama.set_attn_implementation("eager")
    cost = count_model("llama", llama)
    square = FLOPS_PER_MULTIPLY_ADD * B * T * T
    assert count_flops(llama, backward=False)["aten.bmm"] == square * cost.mixing_per_earlier
    assoc = build("assoc")
    cost = count_model("assoc", assoc)
    assert count_flops(assoc, backward=True)["aten.bmm"] == square * cost.choices_per_earlier


def test_sequences_are_made_of_tokens() -> None:
    cost = TokenCost(
        linear=100, head=10, mixing=5, choices=3, mixing_per_earlier=2, choices_per_earlier=1
    )
    assert cost.count_token(0) == 100 + 10 + 5 + 3 + 3
    assert cost.count_forward(4) == sum(cost.count_token(t) for t in range(4))
    assert cost.count_prefill(4) == cost.count_forward(4) - 3 * 10
    # Choices have no backward pass.
    assert cost.count_train_step(4) == 3 * cost.count_forward(4) - 2 * (4 * 3 + 10)


def test_core_at_the_size_of_the_paper() -> None:
    cost = count_model("core", BenchModel(name="core").build(max_tokens=1, seed=0, device="cpu"))
    step_flops = FLOPS_PER_MULTIPLY_ADD * 16 * cost.count_train_step(128)
    assert step_flops == pytest.approx(2.6e9, rel=0.15)
