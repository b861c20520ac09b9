"""Passes that hold whole layers (projections, mixing, feed-forward, head): native against torch."""

import functools

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy, gelu, layer_norm, linear, pad, rms_norm, silu

from tests.models import VARIANTS, build_model, draw_ids
from tests.ops.oracle import Outputs, compare_with_reference
from tests.tolerances import error, limit
from unimatrix.errors import InputError
from unimatrix.kernels.passes.feed_forward_native import (
    add_feed_forward_native,
    prepare_feed_forward,
)
from unimatrix.kernels.passes.head_native import prepare_head, sum_cross_entropy_native
from unimatrix.kernels.passes.mixing_native import add_mixed_native, prepare_mixing
from unimatrix.kernels.passes.projection_native import prepare_projections, project_native
from unimatrix.nn.pointer_mixture import MixedLogits, score_targets
from unimatrix.nn.short_convolution import ShortConvolution
from unimatrix.ops.numba.tiles import TILE

EPS = 1e-5
DTYPES = (torch.float64, torch.float32)
# Fewer rows than a tile, as many, and several tiles with a rest that is no multiple of six or two.
ROWS = (1, TILE, 2 * TILE + 5)
Leaves = dict[str, Tensor | None]


@pytest.fixture(autouse=True)
def _poison_empty_tensors():
    """Fill every ``torch.empty`` with NaN: nothing may be read that was not written."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def draw(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Return a matrix that keeps the scale of what it is applied to."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return (numbers / shape[-1] ** 0.5 if len(shape) == 2 else numbers).to(dtype)


def normalize(x: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
    """Return RMSNorm, or with a shift LayerNorm."""
    if shift is None:
        return rms_norm(x, x.shape[-1:], scale, EPS)
    return layer_norm(x, x.shape[-1:], scale, shift, EPS)


def run_feed_forward(backend: str, x, scale, shift, gate, up, up_bias, down, down_bias) -> Outputs:
    """Return the stream after the network, gated or not."""
    if backend == "native":
        matrices = [up] if gate is None else [gate, up]
        weights = prepare_feed_forward(scale, shift, EPS, matrices, up_bias, down, down_bias)
        return {"y": add_feed_forward_native(x, weights)}
    h = normalize(x, scale, shift)
    inner = gelu(linear(h, up, up_bias)) if gate is None else silu(linear(h, gate)) * linear(h, up)
    return {"y": x + linear(inner, down, down_bias)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "inner"), [(16, 16), (64, 171), (48, 5)])
@pytest.mark.parametrize("is_centred", [False, True])
@pytest.mark.parametrize("is_gated", [False, True])
def test_feed_forward(
    is_gated: bool, is_centred: bool, width: int, inner: int, dtype: torch.dtype
) -> None:
    make = functools.partial(draw, dtype=dtype)
    for num_rows in ROWS:
        leaves: Leaves = {
            "x": make(1, num_rows, width, seed=1),
            "scale": make(width, seed=2),
            "shift": make(width, seed=3) if is_centred else None,
            "gate": make(inner, width, seed=4) if is_gated else None,
            "up": make(inner, width, seed=5),
            "up_bias": None if is_gated else make(inner, seed=6),
            "down": make(width, inner, seed=7),
            "down_bias": None if is_gated else make(width, seed=8),
        }
        compare_with_reference("fused_passes", "native", run_feed_forward, leaves)


def run_mixing(backend: str, x, h, readout, out, gates, gates_bias, **others) -> Outputs:
    """Return the stream after the gated sum of the contexts."""
    contexts = [readout, *others.values()]
    if backend == "native":
        return {"y": add_mixed_native(x, h, contexts, prepare_mixing(out, [gates], [gates_bias]))}
    shares = torch.sigmoid(linear(h, gates, gates_bias)).chunk(len(contexts), dim=-1)
    contexts[0] = linear(readout, out)
    return {"y": x + sum(s * c for s, c in zip(shares, contexts, strict=True))}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_contexts", [1, 2, 3])
@pytest.mark.parametrize(("width", "inner"), [(16, 48), (64, 64)])
def test_mixing(width: int, inner: int, num_contexts: int, dtype: torch.dtype) -> None:
    make = functools.partial(draw, dtype=dtype)
    for num_rows in ROWS:
        leaves: Leaves = {
            "x": make(1, num_rows, width, seed=1),
            "h": make(1, num_rows, width, seed=2),
            "readout": make(1, num_rows, inner, seed=3),
            "out": make(width, inner, seed=4),
            "gates": make(num_contexts * width, width, seed=5),
            "gates_bias": make(num_contexts * width, seed=6),
        }
        for n in range(num_contexts - 1):
            leaves[f"context_{n}"] = make(1, num_rows, width, seed=7 + n)
        compare_with_reference("fused_passes", "native", run_mixing, leaves)


def run_projections(
    squashes: bool, backend: str, x, recent, scale, shift, filters, vectors, controls, controls_bias
) -> Outputs:
    """Return the normalised stream, the vectors and the controls."""
    if backend == "native":
        layers = [vectors], [controls], [controls_bias]
        weights = prepare_projections(scale, shift, EPS, filters, *layers)
        h, made, logits = project_native(x, recent, weights, squashes=squashes)
        return {"h": h, "vectors": made, "controls": logits}
    h = normalize(x, scale, shift)
    source = h
    if filters is not None:
        convolution = ShortConvolution(h.shape[2], filters.shape[0])
        source, _ = functional_call(convolution, {"weight": filters}, (h, recent, None))
    made = linear(source, vectors)
    made = made.tanh() if squashes else made
    return {"h": h, "vectors": made, "controls": linear(h, controls, controls_bias)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_centred", [False, True])
@pytest.mark.parametrize(("num_taps", "is_carried"), [(0, False), (2, True), (4, False), (7, True)])
def test_projections(num_taps: int, is_carried: bool, is_centred: bool, dtype: torch.dtype) -> None:
    make = functools.partial(draw, dtype=dtype)
    for batch_size, num_tokens in ((2, 1), (3, 5), (1, TILE), (2, 2 * TILE + 5), (1, TILE + 2)):
        for width, num_controls in ((16, 3), (64, 16)):
            before = make(batch_size, num_taps - 1, width, seed=2) if is_carried else None
            leaves: Leaves = {
                "x": make(batch_size, num_tokens, width, seed=1),
                "recent": before,
                "scale": make(width, seed=3),
                "shift": make(width, seed=4) if is_centred else None,
                "filters": make(num_taps, width, seed=5) if num_taps else None,
                "vectors": make(3 * width, width, seed=6),
                "controls": make(num_controls, width, seed=7),
                "controls_bias": make(num_controls, seed=8),
            }
            run = functools.partial(run_projections, is_centred)
            compare_with_reference("fused_passes", "native", run, leaves)


def run_head(
    targets: Tensor,
    token_ids: Tensor | None,
    counts: Tensor | None,
    backend: str,
    h,
    weight,
    shares,
) -> Outputs:
    """Return the summed loss of plain logits, of votes on them, or of a mixture with them."""
    if backend == "native":
        inputs = (targets, token_ids, shares, counts)
        return {"nats": sum_cross_entropy_native(h, prepare_head(weight), *inputs, ignored=-100)}
    counts = torch.ones_like(targets) if counts is None else counts
    logits = linear(h, weight)
    if shares is None or token_ids is None or shares.shape == token_ids.shape:
        if shares is not None and token_ids is not None:
            logits = logits.scatter_add(-1, token_ids, shares)
        return {"nats": (cross_entropy(logits[0], targets[0], reduction="none") * counts[0]).sum()}
    counted = targets >= 0
    nats = score_targets(MixedLogits(logits, token_ids, shares), targets.clamp_min(0))
    return {"nats": (nats * counts)[counted].sum()}


def draw_pointer(
    targets: Tensor, vocab: int, pointed: str, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """Return ids that a pointer proposes, some of them twice or right, and their shares."""
    if pointed == "nothing":
        return None, None
    generator = torch.Generator().manual_seed(4)
    token_ids = torch.randint(0, vocab, (*targets.shape, 3), generator=generator)
    token_ids[:, ::2, 0] = targets[:, ::2].clamp_min(0)
    token_ids[:, ::3, 1] = token_ids[:, ::3, 0]
    shares = draw(*targets.shape, 4, dtype=dtype, seed=5).log_softmax(dim=-1)
    if pointed == "votes":
        return token_ids, shares[..., 1:].exp()
    shares[:, ::5, 1:3] = -torch.inf
    return token_ids, shares


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighs", [False, True])
@pytest.mark.parametrize("pointed", ["nothing", "votes", "mixture"])
def test_head(pointed: str, weighs: bool, dtype: torch.dtype) -> None:
    make = functools.partial(draw, dtype=dtype)
    generator = torch.Generator().manual_seed(3)
    for num_rows in ROWS:
        for width, vocab in ((16, 5), (64, 259), (48, 32)):
            targets = torch.randint(0, vocab, (1, num_rows), generator=generator)
            targets[:, 1::4] = -100
            token_ids, shares = draw_pointer(targets, vocab, pointed, dtype)
            leaves: Leaves = {
                "h": make(1, num_rows, width, seed=1),
                "weight": make(vocab, width, seed=2) * width**0.5,
                "shares": shares,
            }
            counts = make(1, num_rows, seed=6).abs() if weighs else None
            run = functools.partial(run_head, targets, token_ids, counts)
            compare_with_reference("fused_passes", "native", run, leaves)


def test_the_loss_of_extremes_is_that_of_torch() -> None:
    targets = torch.zeros(1, 1, dtype=torch.int64)
    h = torch.ones(1, 1, 16)
    for weight in (1e4 * torch.eye(16), torch.full((3, 16), -1e6), torch.full((3, 16), torch.nan)):
        nats = sum_cross_entropy_native(h, prepare_head(weight), targets, ignored=-100)
        expected = cross_entropy(linear(h, weight)[0], targets[0])
        torch.testing.assert_close(nats, expected, equal_nan=True)


def test_a_label_that_is_no_token() -> None:
    head, h = prepare_head(torch.ones(5, 16)), torch.ones(1, 3, 16)
    nothing = sum_cross_entropy_native(h, head, torch.full((1, 3), -100), ignored=-100)
    assert nothing == 0
    for label in (5, -1):
        with pytest.raises(InputError, match=rf"label {label} is no token .* pass 0 to 4, or -100"):
            sum_cross_entropy_native(h, head, torch.tensor([[0, label, -100]]), ignored=-100)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [30.0, 1e4, 1e18])
def test_extremes_are_those_of_torch(size: float, dtype: torch.dtype) -> None:
    """Before an activation, both signs and zero; what is no number stays none."""
    bias = pad(torch.tensor([-size, -1.0, 0.0, 1.0, size], dtype=dtype), (0, 11))
    x, one = torch.zeros(1, 1, 16, dtype=dtype), torch.ones(16, dtype=dtype)
    eye = torch.eye(16, dtype=dtype)

    def run(bias: Tensor) -> tuple[Tensor, Tensor]:
        # LayerNorm of zeros is its shift.
        network = prepare_feed_forward(one, bias, EPS, [eye], 0 * one, eye, 0 * one)
        layers = prepare_projections(one, bias, EPS, None, [eye], [eye], [0 * one])
        vectors = project_native(x, None, layers, squashes=True)[1]
        return add_feed_forward_native(x, network)[0, 0], vectors[0, 0]

    activated, squashed = run(bias)
    torch.testing.assert_close(activated, gelu(bias), rtol=1e-5, atol=1e-30)
    torch.testing.assert_close(squashed, bias.tanh(), rtol=1e-5, atol=0)
    assert all(found.isnan().all() for found in run(torch.nan * bias))


@pytest.mark.parametrize("num_threads", [2, 3])
def test_the_threads_agree_with_one(num_threads: int) -> None:
    """Results are the same numbers; gradients are summed in another order."""
    make = functools.partial(draw, dtype=torch.float64)
    before, found = torch.get_num_threads(), []
    weights = [
        make(64, seed=2),
        make(171, 64, seed=3),
        make(171, 64, seed=4),
        make(64, 171, seed=5),
    ]
    try:
        for count in (1, num_threads):
            torch.set_num_threads(count)
            leaves = [make(3, 400, 64, seed=1), *weights]
            x, scale, gate, up, down = (leaf.clone().requires_grad_() for leaf in leaves)
            weights_given = prepare_feed_forward(scale, None, EPS, [gate, up], None, down, None)
            y = add_feed_forward_native(x, weights_given)
            y.square().sum().backward()
            found.append([y.detach(), *(leaf.grad for leaf in (x, scale, gate, up, down))])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0][0], found[1][0])
    for one, many in zip(*found, strict=True):
        torch.testing.assert_close(many, one, rtol=1e-11, atol=1e-11)


def measure(backend: str, variant: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return logits and gradients of a model whose widths the passes take."""
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "head_dim": 8, "slot_key_size": 16}
    kept = {key: value for key, value in sizes.items() if key not in VARIANTS[variant]}
    model = build_model(variant, dtype=dtype, dropout=0.0, **kept).train()
    model.set_backend({"fused_passes": backend})
    ids = draw_ids(2, 40)
    loss = model(ids, labels=ids, loss_only=True).loss
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": model(ids).logits.detach(), "loss": loss.detach(), **grads}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_preset_is_the_same_with_them(variant: str) -> None:
    expected = measure("reference", variant, torch.float64)
    actual = measure("native", variant, torch.float64)
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        quantity = "value" if name in ("logits", "loss") else "grad"
        assert error(actual[name], tensor) < limit("fused_passes", torch.float64, quantity), name
