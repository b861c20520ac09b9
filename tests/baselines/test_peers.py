"""Every peer is causal, trains on unshifted labels, and has the size it says."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from unimatrix.baselines.peers import PEERS
from unimatrix.configuration import UniMatrixConfig

SMALL = {"vocab_size": 23, "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "dropout": 0.0}


def build_peer(name: str, **fields):
    """Return a small peer."""
    torch.manual_seed(0)
    config = UniMatrixConfig(**(SMALL | TOKENS | fields))
    return PEERS[name].build(config, max_tokens=64)


@pytest.mark.parametrize("name", PEERS)
def test_causal_and_trained_on_shifted_labels(name) -> None:
    model = build_peer(name).eval()
    ids = torch.randint(0, 23, (2, 40), generator=torch.Generator().manual_seed(1))
    labels, changed = ids[:, 1:].contiguous(), ids.clone()
    changed[:, 25] = (changed[:, 25] + 1) % 23
    with torch.no_grad():
        one, other = (model(input_ids=x, use_cache=False).logits for x in (ids, changed))
        loss = model(
            input_ids=ids[:, :-1], labels=labels, shift_labels=labels, use_cache=False
        ).loss
    assert torch.allclose(one[:, :25], other[:, :25], atol=1e-6)
    assert (one[:, 25:] - other[:, 25:]).abs().amax() > 1e-6
    expected = cross_entropy(one[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("name", PEERS)
def test_parameters_are_affine_in_the_inner_width(name) -> None:
    config = UniMatrixConfig(**(SMALL | TOKENS))
    counts = [
        PEERS[name].build(config, max_tokens=64, inner_size=size).num_parameters()
        for size in (16, 24, 40)
    ]
    assert counts[2] - counts[1] == 2 * (counts[1] - counts[0]) > 0


@pytest.mark.parametrize(("vocab_size", "expected"), [(259, 174_848), (64, 162_368)])
def test_the_papers_transformer_has_the_published_size(vocab_size, expected) -> None:
    config = UniMatrixConfig(vocab_size=vocab_size, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model = PEERS["gelu-transformer"].build(config, max_tokens=128)
    assert model.num_parameters() == expected


def test_the_papers_transformer_starts_as_published() -> None:
    torch.manual_seed(0)
    model = PEERS["gelu-transformer"].build(UniMatrixConfig(), max_tokens=128)
    multi_head = torch.nn.MultiheadAttention(64, 4)
    for block in model.transformer.h:
        expected = multi_head.in_proj_weight.std().item()
        assert block.attn.c_attn.weight.std().item() == pytest.approx(expected, rel=0.05)
        assert block.attn.c_attn.bias.abs().max() == 0
        for weight in (block.attn.c_proj.weight, block.mlp.c_proj.weight, block.mlp.c_fc.weight):
            assert weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_one_layer_serves_every_depth_step(tmp_path) -> None:
    deep, shallow = (build_peer("universal-transformer", num_hidden_layers=n) for n in (3, 1))
    assert deep.num_parameters() == shallow.num_parameters()
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        deep.load_state_dict(shallow.state_dict())
        layer = shallow.model.layers[0]
        shallow.model.layers[0].num_times = 3
        assert torch.equal(deep(ids).logits, shallow(ids).logits)
        layer.num_times = 1
        assert not torch.equal(deep(ids).logits, shallow(ids).logits)
    with pytest.raises(ValueError, match="keeps no cache"):
        deep(ids, use_cache=True)
    deep.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
