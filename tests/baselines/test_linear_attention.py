"""The chunked forms are the loop, and the model continues where it stopped."""

import pytest
import torch
from torch.nn.functional import logsigmoid, normalize

from tests.tolerances import error, limit
from unimatrix.baselines.linear_attention.chunked import chunk_gated, chunk_gated_delta
from unimatrix.baselines.linear_attention.modeling import (
    RULES,
    LinearAttentionConfig,
    LinearAttentionForCausalLM,
)
from unimatrix.baselines.linear_attention.reference import scan_gated, scan_gated_delta
from unimatrix.errors import InputError

B, H, K, P = 2, 3, 5, 4
PAIRS = {"gated": (scan_gated, chunk_gated), "gated_delta": (scan_gated_delta, chunk_gated_delta)}


def draw_inputs(rule: str, num_tokens: int, dtype=torch.float64, speed: float = 1.0):
    """Return the inputs of a rule and a state to start from, as leaves."""
    generator = torch.Generator().manual_seed(num_tokens)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k, v = draw(B, num_tokens, H, K), draw(B, num_tokens, H, K), draw(B, num_tokens, H, P)
    state = draw(B, H, K, P)
    if rule == "gated":
        inputs = [q, k, v, speed * logsigmoid(draw(B, num_tokens, H, K)), state]
    else:
        log_retention = speed * logsigmoid(draw(B, num_tokens, H))
        beta = draw(B, num_tokens, H).sigmoid()
        inputs = [q, normalize(k, dim=-1), v, log_retention, beta, state]
    return [x.to(dtype).requires_grad_() for x in inputs]


def build_model(rule: str, **fields) -> LinearAttentionForCausalLM:
    """Return a small model in float64, its weights far from their start."""
    settings = {"vocab_size": 11, "hidden_size": 12, "intermediate_size": 8, "key_head_dim": 3}
    settings |= {"num_hidden_layers": 2, "num_attention_heads": 2, "value_head_dim": 5}
    settings |= {"conv_size": 4 if rule == "gated_delta" else 0}
    torch.manual_seed(0)
    config = LinearAttentionConfig(rule=rule, initializer_range=0.4, **(settings | fields))
    return LinearAttentionForCausalLM(config).double().eval()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize(("num_tokens", "chunk"), [(1, 4), (4, 4), (5, 4), (21, 8), (6, 16)])
def test_chunked_is_the_loop(rule, given, num_tokens, chunk) -> None:
    scan, chunked = PAIRS[rule]
    outputs = []
    for compute, options in ((scan, {}), (chunked, {"chunk": chunk})):
        leaves = draw_inputs(rule, num_tokens)
        y, state = compute(*(leaves if given else leaves[:-1]), **options)
        used = leaves if given else leaves[:-1]
        weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
        gradients = torch.autograd.grad((y * weights).sum() + state.sin().sum(), used)
        outputs.append([y, state, *gradients])
    for found, expected in zip(outputs[1], outputs[0], strict=True):
        assert error(found, expected) <= limit("linear_attention", torch.float64, "value")


@pytest.mark.parametrize("rule", RULES)
def test_gradients_are_derivatives(rule) -> None:
    leaves = draw_inputs(rule, 5)
    assert torch.autograd.gradcheck(lambda *x: PAIRS[rule][1](*x, chunk=3), leaves)


@pytest.mark.parametrize("rule", RULES)
def test_fast_forgetting_does_not_overflow(rule) -> None:
    scan, chunked = PAIRS[rule]
    leaves = draw_inputs(rule, 40, torch.float32, speed=60.0)
    expected, found = scan(*leaves), chunked(*leaves)
    for one, other in zip(found, expected, strict=True):
        assert error(one, other) <= limit("linear_attention", torch.float32, "value")
    gradients = torch.autograd.grad(found[0].sum(), leaves)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("pieces", [(40,), (1, 39), (3, 2, 16, 19), (1,) * 40])
def test_the_cache_continues_the_sequence(rule, pieces) -> None:
    model = build_model(rule)
    ids = torch.randint(0, 11, (2, 40), generator=torch.Generator().manual_seed(1))
    cache, logits = None, []
    with torch.no_grad():
        expected = model(ids).logits
        for piece in ids.split(pieces, dim=1):
            output = model(piece, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits.append(output.logits)
    assert error(torch.cat(logits, dim=1), expected) <= limit("model", torch.float64, "value")


@pytest.mark.parametrize("rule", RULES)
def test_no_position_sees_the_future(rule) -> None:
    model = build_model(rule)
    ids = torch.randint(0, 11, (1, 37), generator=torch.Generator().manual_seed(2))
    changed = ids.clone()
    changed[0, 20] = (changed[0, 20] + 1) % 11
    with torch.no_grad():
        one, other = model(ids).logits, model(changed).logits
    assert torch.equal(one[:, :20], other[:, :20])
    assert (one[:, 20:] - other[:, 20:]).abs().amax(dim=-1).min() > 0


@pytest.mark.parametrize("rule", RULES)
def test_every_weight_learns_and_is_saved(rule, tmp_path) -> None:
    model = build_model(rule).train()
    ids = torch.randint(0, 11, (2, 9), generator=torch.Generator().manual_seed(3))
    loss = model(ids, labels=ids, shift_labels=ids).loss
    expected = torch.nn.functional.cross_entropy(model(ids).logits.flatten(0, 1), ids.flatten())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    assert model.lm_head.weight is model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    loaded = LinearAttentionForCausalLM.from_pretrained(tmp_path)
    # In tensors of their own: mapped from a file, weights lie at odd addresses, where a vectorised
    # sum may round its last bit otherwise.
    again = LinearAttentionForCausalLM(loaded.config).double().eval()
    again.load_state_dict(loaded.state_dict())
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model.eval()(ids).logits)


def test_an_unknown_rule() -> None:
    with pytest.raises(InputError, match="rule is 'delta'; choose one of gated, gated_delta"):
        LinearAttentionConfig(rule="delta")
