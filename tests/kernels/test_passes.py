"""Passes around the scan (E11, E19, E22, E23): against the modules and plain torch, and by hand."""

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import rms_norm, silu

from tests.models import build_model
from tests.ops.oracle import Outputs, compare_with_reference
from unimatrix.errors import InputError
from unimatrix.kernels.passes.convolution_native import convolve_recent_native
from unimatrix.kernels.passes.embedding_native import embed_tokens_native
from unimatrix.kernels.passes.gated_sum_native import sum_gated_native
from unimatrix.kernels.passes.gated_unit_native import apply_gated_unit_native
from unimatrix.kernels.passes.row_norm_native import normalize_rows_native
from unimatrix.kernels.plan import _plan_embedding
from unimatrix.nn.short_convolution import ShortConvolution

# Rows shorter than the lanes of a kernel, as long, longer with and without a rest.
WIDTHS = (3, 16, 37, 64)
DTYPES = (torch.float64, torch.float32)
Leaves = dict[str, torch.Tensor | None]


@pytest.fixture(autouse=True)
def _poison_empty_tensors():
    """Fill every ``torch.empty`` with NaN: nothing may be read that was not written."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def draw(*shape: int, dtype: torch.dtype, seed: int = 5, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)


def sum_gated(gates: Tensor, contexts: list[Tensor]) -> Tensor:
    """Return what the block computes of the gates' logits side by side."""
    shares = torch.sigmoid(gates).chunk(len(contexts), dim=-1)
    return sum(share * context for share, context in zip(shares, contexts, strict=True))


def run_norm(backend: str, x, weight) -> Outputs:
    if backend == "native":
        return {"y": normalize_rows_native(x, weight, 1e-5)}
    return {"y": rms_norm(x, x.shape[-1:], weight, 1e-5)}


def run_sum(backend: str, gates, **contexts) -> Outputs:
    apply = sum_gated_native if backend == "native" else sum_gated
    return {"y": apply(gates, list(contexts.values()))}


def run_unit(backend: str, x) -> Outputs:
    if backend == "native":
        return {"y": apply_gated_unit_native(x)}
    gate, up = x.chunk(2, dim=-1)
    return {"y": silu(gate) * up}


def run_convolution(backend: str, h, weight, recent) -> Outputs:
    num_taps, width = weight.shape
    if backend == "native":
        before = h.new_zeros(h.shape[0], num_taps - 1, width) if recent is None else recent
        return {"y": convolve_recent_native(h, weight, before)}
    convolution = ShortConvolution(width, num_taps)
    return {"y": functional_call(convolution, {"weight": weight}, (h, recent, None))[0]}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("num_rows", [1, 64, 130])
def test_norm(num_rows: int, width: int, dtype: torch.dtype) -> None:
    x = draw(2, num_rows, width, dtype=dtype)
    for weight in (None, draw(width, dtype=dtype, seed=1)):
        compare_with_reference("fused_passes", "native", run_norm, {"x": x, "weight": weight})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("num_contexts", [1, 2, 3])
def test_gated_sum(num_contexts: int, width: int, dtype: torch.dtype) -> None:
    leaves: Leaves = {"gates": draw(2, 20, num_contexts * width, dtype=dtype, scale=8.0)}
    for n in range(num_contexts):
        leaves[f"context_{n}"] = draw(2, 20, width, dtype=dtype, seed=n + 1)
    compare_with_reference("fused_passes", "native", run_sum, leaves)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_gated_unit(width: int, dtype: torch.dtype) -> None:
    x = draw(3, 11, 2 * width, dtype=dtype, scale=6.0)
    compare_with_reference("fused_passes", "native", run_unit, {"x": x})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("num_tokens", [1, 2, 63, 65, 130])
def test_convolution(num_tokens: int, width: int, dtype: torch.dtype) -> None:
    for num_taps in (2, 4):
        recent = draw(2, num_taps - 1, width, dtype=dtype, seed=2)
        for before in (None, recent):
            leaves: Leaves = {
                "h": draw(2, num_tokens, width, dtype=dtype),
                "weight": draw(num_taps, width, dtype=dtype, seed=1),
                "recent": before,
            }
            compare_with_reference("fused_passes", "native", run_convolution, leaves)


def test_the_threads_agree_with_one() -> None:
    before = torch.get_num_threads()
    x, gates = draw(3000, 64, dtype=torch.float32), draw(3000, 192, dtype=torch.float32)
    results = []
    try:
        for num_threads in (1, 3):
            torch.set_num_threads(num_threads)
            results.append(
                [
                    normalize_rows_native(x, None, 1e-5),
                    sum_gated_native(gates, [x, 2 * x, -x]),
                    apply_gated_unit_native(gates),
                    convolve_recent_native(x.view(3, 1000, 64), x[:4], x.new_zeros(3, 3, 64)),
                ]
            )
    finally:
        torch.set_num_threads(before)
    for one, many in zip(*results, strict=True):
        assert torch.equal(one, many)


def test_by_hand() -> None:
    x = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    expected = x / torch.tensor(12.5 + 0.5, dtype=torch.float64).sqrt()
    torch.testing.assert_close(normalize_rows_native(x, None, 0.5), expected)
    weight = torch.tensor([2.0, -1.0], dtype=torch.float64)
    torch.testing.assert_close(normalize_rows_native(x, weight, 0.5), expected * weight)
    share = 1 / (1 + torch.exp(-x))
    torch.testing.assert_close(
        sum_gated_native(torch.cat([x, -x], dim=-1), [x, 5 * x]), share * x + (1 - share) * 5 * x
    )
    unit = apply_gated_unit_native(torch.cat([x, 7 * x], dim=-1))
    torch.testing.assert_close(unit, x * share * 7 * x)
    h = x.T.reshape(1, 2, 1)  # 3, then 4; 5 before them
    taps = torch.tensor([[0.5], [2.0]], dtype=torch.float64)
    convolved = convolve_recent_native(h, taps, 5 * torch.ones_like(h[:, :1]))
    torch.testing.assert_close(convolved.flatten().tolist(), [8.5, 9.5])


def test_extreme_gates_stay_finite() -> None:
    gates = torch.tensor([-torch.inf, -1e4, -100.0, 0.0, 100.0, 1e4, torch.inf]).repeat(20, 3)
    for apply in (sum_gated, sum_gated_native):
        shares = apply(gates, [torch.ones_like(gates)])[0, :7]
        expected = torch.tensor([0.0, 0.0, 0.0, 0.5, 1.0, 1.0, 1.0])
        torch.testing.assert_close(shares, expected, rtol=0, atol=1e-30)
    spoilt = sum_gated_native(gates * torch.nan, [torch.ones_like(gates)])
    assert spoilt.isnan().all()


def test_a_back_end_that_the_passes_do_not_have() -> None:
    model = build_model("selective")
    with pytest.raises(InputError, match="not available for fused_passes"):
        model.set_backend({"fused_passes": "triton-like"})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [5, 64])
@pytest.mark.parametrize("allows_none", [False, True])
def test_embedding(allows_none: bool, width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    token_ids = torch.randint(-int(allows_none), 7, (3, 80), generator=generator)

    def run(backend: str, table) -> Outputs:
        if backend == "native":
            return {"rows": embed_tokens_native(token_ids, table, allows_none=allows_none)}
        rows = functional_call(nn.Embedding(7, width), {"weight": table}, token_ids.clamp(min=0))
        return {"rows": rows * (token_ids >= 0).unsqueeze(-1)}

    leaves = {"table": torch.randn(7, width, generator=generator).to(dtype)}
    compare_with_reference("fused_passes", "native", run, leaves)


def explain_embedding(embed: nn.Embedding, num_ids: int = 40) -> str | None:
    """Return why an embedding is no pass."""
    reasons: dict[str, str] = {}
    run = _plan_embedding("it", embed, torch.zeros(16), num_ids, reasons)
    assert (run is None) == bool(reasons)
    return reasons.get("it")


def test_an_embedding_takes_the_pass_where_it_is_no_more_than_its_rows() -> None:
    embed = nn.Embedding(20, 16)
    assert explain_embedding(embed) is None
    assert explain_embedding(embed, 20) is None
    assert explain_embedding(embed, 19) == "it has more rows than the call has tokens"
    limited = {"padding_idx": 0}, {"max_norm": 1.0}
    for options in limited:
        assert explain_embedding(nn.Embedding(20, 16, **options)) == (
            "it has a padding_idx or max_norm"
        )
    for options in ({"sparse": True}, {"scale_grad_by_freq": True}):
        assert explain_embedding(nn.Embedding(20, 16, **options)) == (
            "it has sparse or scaled gradients"
        )
    assert explain_embedding(embed.double()) == "a weight of it is float64 on cpu, others are not"
    embed.float().register_forward_hook(lambda *_: None)
    assert explain_embedding(embed) == "it has a hook"


@pytest.mark.parametrize("token_id", [-1, 20, -2])
def test_a_token_that_is_not_in_the_vocabulary(token_id: int) -> None:
    ids, table = torch.full((2, 20), 6), torch.randn(20, 16)
    ids[1, 3] = token_id
    with pytest.raises(InputError, match=rf"token id {token_id} is not .* pass 0 to 19"):
        embed_tokens_native(ids, table, allows_none=False)
    if token_id == -1:
        assert not embed_tokens_native(ids, table, allows_none=True)[1, 3].any()
    else:
        with pytest.raises(InputError, match=rf"token id {token_id} is not in the vocabulary"):
            embed_tokens_native(ids, table, allows_none=True)
