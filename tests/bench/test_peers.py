"""Peers: the sizes that were published, causality, and caches that continue."""

import copy

import pytest
import torch

from unimatrix.bench.models import BenchModel, match_parameters
from unimatrix.bench.peers import TIMED_PEERS
from unimatrix.bench.workloads import prefill, step_once
from unimatrix.errors import InputError

ON_CPU = [name for name, peer in TIMED_PEERS.items() if not peer.needs]
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8}


def build(name: str, **overrides):
    spec = BenchModel(name=name, overrides=overrides)
    return spec, spec.build(max_tokens=64, seed=0, device="cpu").eval()


@pytest.mark.parametrize(
    ("name", "parameters"), [("llama", 164_672), ("mamba2", 101_096), ("rwkv", 195_264)]
)
def test_parameters_at_the_pilot_width(name: str, parameters: int) -> None:
    _, model = build(name)
    assert model.num_parameters() == parameters


def test_a_given_feed_forward_width_is_that_of_the_peers() -> None:
    _, model = build("llama", **SMALL, intermediate_size=48)
    assert model.config.intermediate_size == 48
    assert model.config.num_key_value_heads == 2
    _, model = build("rwkv", **SMALL, intermediate_size=48)
    assert model.config.intermediate_size == 48


@pytest.mark.parametrize("name", ON_CPU)
@torch.no_grad()
def test_causal_and_continued_by_its_cache(name: str) -> None:
    spec, model = build(name, **SMALL)
    ids = torch.randint(0, 256, (1, 12), generator=torch.Generator().manual_seed(0))
    logits = model(input_ids=ids).logits
    changed = ids.clone()
    changed[0, 8] = (changed[0, 8] + 1) % 256
    torch.testing.assert_close(model(input_ids=changed).logits[:, :8], logits[:, :8])
    carried = prefill(spec, model, ids[:, :9])  # reads 8
    before = copy.deepcopy(carried)
    kept = step_once(spec, model, ids[:, 8:9], carried)
    output = model(input_ids=ids[:, 9:10], use_cache=True, **{spec.cache_name: kept})
    torch.testing.assert_close(output.logits[:, -1], logits[:, 9], rtol=1e-4, atol=1e-5)
    # A copy made before continues from where it was made.
    again = model(input_ids=ids[:, 8:9], use_cache=True, **{spec.cache_name: before})
    torch.testing.assert_close(again.logits[:, -1], logits[:, 8], rtol=1e-4, atol=1e-5)


def test_peers_of_a_gpu_library_say_why_they_are_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "CUDA" in str(TIMED_PEERS["gla"].explain_absence("cpu"))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert "not installed" in str(TIMED_PEERS["gated-deltanet"].explain_absence("cuda"))
    assert TIMED_PEERS["llama"].explain_absence("cpu") is None


def test_peers_get_as_many_parameters_as_the_first_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = {"hidden_size": 128, "head_dim": 32}
    names = ("unimatrix", "core", "llama", "rwkv", "mamba2", "gla")
    specs = [BenchModel(name=name, overrides=wide) for name in names]
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    matched = match_parameters(specs)
    assert [spec.name for spec in matched] == list(names)
    assert (matched[0], matched[1], matched[-1]) == (specs[0], specs[1], specs[-1])
    target, _, *counts = (
        spec.build(max_tokens=8, seed=0, device="cpu").num_parameters() for spec in matched[:-1]
    )
    for spec, count, within in zip(matched[2:-1], counts, (0.01, 0.01, 0.05), strict=True):
        assert abs(count - target) <= within * target, spec
        assert spec.overrides["hidden_size"] % 8 == 0
        assert spec.overrides["head_dim"] == 32


def test_a_size_out_of_reach_is_refused() -> None:
    deep = {"num_hidden_layers": 24}
    specs = [BenchModel(name=name, overrides=deep) for name in ("core", "rwkv")]
    with pytest.raises(InputError, match=r"rwkv has no size with about [\d,]+ parameters"):
        match_parameters(specs)
