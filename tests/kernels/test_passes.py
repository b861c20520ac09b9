"""Fused passes (E11, E19, E22, E23): native against the reference, the reference by hand."""

import pytest
import torch
from unimatrix.nn.embed_tokens import _is_pass, embed_tokens

from tests.ops.oracle import Outputs, candidates, compare_with_reference
from unimatrix.errors import InputError
from unimatrix.kernels.passes import (
    apply_gated_unit,
    convolve_recent,
    normalize_rows,
    sum_gated,
)

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


def run_norm(backend: str, x, weight) -> Outputs:
    return {"y": normalize_rows(x, weight, 1e-5, backend=backend)}


def run_sum(backend: str, gates, **contexts) -> Outputs:
    return {"y": sum_gated(gates, list(contexts.values()), backend=backend)}


def run_unit(backend: str, x) -> Outputs:
    return {"y": apply_gated_unit(x, backend=backend)}


def run_convolution(backend: str, h, weight, recent) -> Outputs:
    return {"y": convolve_recent(h, weight, recent, backend=backend)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("num_rows", [1, 64, 130])
@pytest.mark.parametrize("backend", candidates("fused_passes"))
def test_norm(backend: str, num_rows: int, width: int, dtype: torch.dtype) -> None:
    x = draw(2, num_rows, width, dtype=dtype)
    for weight in (None, draw(width, dtype=dtype, seed=1)):
        compare_with_reference("fused_passes", backend, run_norm, {"x": x, "weight": weight})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("num_contexts", [1, 2, 3])
@pytest.mark.parametrize("backend", candidates("fused_passes"))
def test_gated_sum(backend: str, num_contexts: int, width: int, dtype: torch.dtype) -> None:
    leaves: Leaves = {"gates": draw(2, 20, num_contexts * width, dtype=dtype, scale=8.0)}
    for n in range(num_contexts):
        leaves[f"context_{n}"] = draw(2, 20, width, dtype=dtype, seed=n + 1)
    compare_with_reference("fused_passes", backend, run_sum, leaves)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("backend", candidates("fused_passes"))
def test_gated_unit(backend: str, width: int, dtype: torch.dtype) -> None:
    x = draw(3, 11, 2 * width, dtype=dtype, scale=6.0)
    compare_with_reference("fused_passes", backend, run_unit, {"x": x})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("num_tokens", [1, 2, 63, 65, 130])
@pytest.mark.parametrize("backend", candidates("fused_passes"))
def test_convolution(backend: str, num_tokens: int, width: int, dtype: torch.dtype) -> None:
    for num_taps in (2, 4):
        recent = draw(2, num_taps - 1, width, dtype=dtype, seed=2)
        for before in (None, recent):
            leaves: Leaves = {
                "h": draw(2, num_tokens, width, dtype=dtype),
                "weight": draw(num_taps, width, dtype=dtype, seed=1),
                "recent": before,
            }
            compare_with_reference("fused_passes", backend, run_convolution, leaves)


def test_the_threads_agree_with_one() -> None:
    before = torch.get_num_threads()
    x, gates = draw(3000, 64, dtype=torch.float32), draw(3000, 192, dtype=torch.float32)
    results = []
    try:
        for num_threads in (1, 3):
            torch.set_num_threads(num_threads)
            results.append(
                [
                    normalize_rows(x, None, 1e-5),
                    sum_gated(gates, [x, 2 * x, -x]),
                    apply_gated_unit(gates),
                    convolve_recent(x.view(3, 1000, 64), x[:4], None),
                ]
            )
    finally:
        torch.set_num_threads(before)
    for one, many in zip(*results, strict=True):
        assert torch.equal(one, many)


def test_reference_by_hand() -> None:
    x = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    expected = x / torch.tensor(12.5 + 0.5, dtype=torch.float64).sqrt()
    torch.testing.assert_close(normalize_rows(x, None, 0.5), expected)
    torch.testing.assert_close(
        normalize_rows(x, torch.tensor([2.0, -1.0], dtype=torch.float64), 0.5),
        expected * torch.tensor([2.0, -1.0], dtype=torch.float64),
    )
    share = 1 / (1 + torch.exp(-x))
    torch.testing.assert_close(
        sum_gated(torch.cat([x, -x], dim=-1), [x, 5 * x]), share * x + (1 - share) * 5 * x
    )
    torch.testing.assert_close(apply_gated_unit(torch.cat([x, 7 * x], dim=-1)), x * share * 7 * x)


def test_extreme_gates_stay_finite() -> None:
    gates = torch.tensor([-torch.inf, -1e4, -100.0, 0.0, 100.0, 1e4, torch.inf]).repeat(20, 3)
    for backend in ("reference", "native"):
        shares = sum_gated(gates, [torch.ones_like(gates)], backend=backend)[0, :7]
        expected = torch.tensor([0.0, 0.0, 0.0, 0.5, 1.0, 1.0, 1.0])
        torch.testing.assert_close(shares, expected, rtol=0, atol=1e-30)
    spoilt = sum_gated(gates * torch.nan, [torch.ones_like(gates)], backend="native")
    assert spoilt.isnan().all()


def test_other_types_take_the_reference() -> None:
    x = draw(40, 8, dtype=torch.float32).bfloat16()
    assert normalize_rows(x, None, 1e-5).dtype == torch.bfloat16
    with pytest.raises(InputError, match="float32 or float64 on the CPU"):
        normalize_rows(x, None, 1e-5, backend="native")
    with pytest.raises(InputError, match="not available for fused_passes"):
        apply_gated_unit(x, backend="triton-like")
    with pytest.raises(InputError, match="there are 2 contexts of width 8 and 8 gate logits"):
        sum_gated(x, [x, x])
    with pytest.raises(InputError, match=r"pass \[B, T, D\], \[K, D\] and \[B, K - 1, D\]"):
        convolve_recent(x.view(1, 40, 8), x[:4], x.view(1, 40, 8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [5, 64])
@pytest.mark.parametrize("allows_none", [False, True])
def test_embedding(allows_none: bool, width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    token_ids = torch.randint(-int(allows_none), 7, (3, 80), generator=generator)

    def run(backend: str, table) -> Outputs:
        embed = torch.nn.Embedding(7, width, dtype=dtype)
        del embed.weight
        embed.weight = table
        given = {"allows_none": allows_none, "backend": backend}
        return {"rows": embed_tokens(embed, token_ids, **given)}

    leaves = {"table": torch.randn(7, width, generator=generator).to(dtype)}
    compare_with_reference("fused_passes", "native", run, leaves)


def test_an_embedding_takes_the_pass_where_it_is_no_more_than_its_rows() -> None:
    ids, embed = torch.full((2, 20), 6), torch.nn.Embedding(20, 16)
    assert _is_pass(embed, ids, "auto")
    assert not _is_pass(embed, ids[:, :9], "auto")
    assert not _is_pass(embed, ids, "reference")
    assert not _is_pass(torch.nn.Embedding(20, 16, padding_idx=0), ids, "auto")
    embed.register_forward_hook(lambda *_: None)
    assert not _is_pass(embed, ids, "auto")


@pytest.mark.parametrize("token_id", [-1, 20, -2])
def test_a_token_that_is_not_in_the_vocabulary(token_id: int) -> None:
    ids, embed = torch.full((2, 20), 6), torch.nn.Embedding(20, 16)
    ids[1, 3] = token_id
    with pytest.raises(InputError, match=rf"token id {token_id} is not .* pass 0 to 19"):
        embed_tokens(embed, ids)
    if token_id == -1:
        assert not embed_tokens(embed, ids, allows_none=True)[1, 3].any()
