"""``scan_matrix_state``: back ends against the reference, the reference by hand (E1 to E4)."""

import functools
import itertools
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch.nn.functional import logsigmoid, normalize

from tests.ops.oracle import Outputs, candidates, compare_with_reference, list_backends
from tests.tolerances import error, limit
from unimatrix.errors import InputError
from unimatrix.ops.matrix_state import bind_and_scan, choose_backend, scan_matrix_state
from unimatrix.ops.matrix_state import scan as matrix_state

B, H, N = 3, 2, 5  # one N nearly everywhere: kernels are compiled once for each
LENGTHS = (1, 2, 63, 64, 65, 100)
DTYPES = (torch.float64, torch.float32)
Leaves = dict[str, torch.Tensor]

# (back end, rule, norm guard) that exist together.
FORMS = [
    (backend, rule, norm_guard)
    for norm_guard in (False, True)
    for rule in ("outer", "mixed", "delta")
    for backend in list_backends("matrix_state")
    if not (norm_guard and (backend == "parallel" or rule == "delta"))
]
CANDIDATES = [form for form in FORMS if form[0] in candidates("matrix_state")]


@pytest.fixture(autouse=True)
def _poison_empty_tensors() -> Iterator[None]:
    """Fill every ``torch.empty`` with NaN: nothing may be read that was not written."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def draw_leaves(
    num_tokens: int,
    *,
    rule: str = "mixed",
    initial: bool = True,
    dtype: torch.dtype = torch.float64,
    sizes: tuple[int, int, int] = (B, H, N),
) -> Leaves:
    """Return inputs as a model makes them; writes are large enough for an active norm guard."""
    generator = torch.Generator().manual_seed(num_tokens)
    batch, heads, n = sizes

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    token = (batch, num_tokens, heads)
    leaves = {
        "q": draw(*token, n).tanh(),
        "k": draw(*token, n).tanh(),
        "v": draw(*token, n).tanh(),
        "d": draw(*token, n).tanh(),
        "log_retention": logsigmoid(draw(*token)),
        "rule_weights": draw(*token, 3).softmax(-1),
        "initial_state": 0.3 * draw(batch, heads, n, n),
        "write_strength": draw(*token).sigmoid(),
    }
    if rule == "delta":
        leaves["v"] = normalize(leaves["v"], dim=-1)
    left_out = {"mixed": {"write_strength"}, "delta": {"d", "rule_weights"}}
    left_out["outer"] = {"write_strength", "d", "rule_weights"}
    unused = left_out[rule] if initial else left_out[rule] | {"initial_state"}
    return {name: x.to(dtype) for name, x in leaves.items() if name not in unused}


def draw_lengths(num_tokens: int) -> torch.Tensor:
    """Return one full row, one empty row, and one in between."""
    return torch.tensor([num_tokens, 0, (num_tokens + 1) // 2])


def scan(backend: str, *, d=None, rule_weights=None, **options) -> Outputs:
    """Run the operator with inputs and outputs by name, as the oracle wants it."""
    q, k, v, log_retention = (options.pop(name) for name in ("q", "k", "v", "log_retention"))
    y, final_state = scan_matrix_state(
        q, k, v, d, log_retention, rule_weights, backend=backend, **options
    )
    return {"y": y, "final_state": final_state}


def compare(backend: str, leaves: Leaves, **options) -> None:
    def run(backend: str, **cloned) -> Outputs:
        return scan(backend, **cloned, **options)

    compare_with_reference("matrix_state", backend, run, leaves)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [*LENGTHS, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("backend", "rule", "norm_guard"), CANDIDATES)
def test_equals_reference(
    backend: str, rule: str, norm_guard: bool, num_tokens: int, dtype: torch.dtype
) -> None:
    for initial, padded in itertools.product((False, True), repeat=2):
        leaves = draw_leaves(num_tokens, rule=rule, initial=initial, dtype=dtype)
        lengths = draw_lengths(num_tokens) if padded else None
        compare(backend, leaves, lengths=lengths, norm_guard=norm_guard)


@pytest.mark.parametrize("chunk_size", [1, 7, 16, 100])
def test_chunk_size_changes_nothing(chunk_size: int) -> None:
    compare("parallel", draw_leaves(100), chunk_size=chunk_size)


def test_states_of_many_chunks_are_carried_in_nested_groups() -> None:
    leaves = draw_leaves(300, rule="outer", sizes=(1, 1, N))
    leaves["log_retention"] = leaves["log_retention"] / 50  # something survives 300 tokens
    compare("parallel", leaves, chunk_size=1)


@pytest.mark.parametrize(
    ("n", "rule"),
    [(1, "mixed"), (1, "delta"), (16, "outer"), (16, "mixed"), (16, "delta"), (33, "outer")],
)
def test_head_sizes_in_threads(n: int, rule: str) -> None:
    leaves = draw_leaves(70, rule=rule, sizes=(16, 2, n), dtype=torch.float32)
    for backend in candidates("matrix_state"):
        compare(backend, leaves)


@pytest.mark.parametrize("backend", list_backends("matrix_state"))
def test_one_write_by_hand(backend: str) -> None:
    """(E1, E2, E4): the payload k comes back along the address v, weighted by pi and 1 - rho."""
    k, v, d = torch.tensor([[1.0, 2.0], [3.0, -1.0], [5.0, 7.0]], dtype=torch.float64)
    q = torch.tensor([0.5, -2.0], dtype=torch.float64)
    rho, pi = 0.75, torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    before = torch.tensor([[0.1, 0.2], [0.3, 0.4]], dtype=torch.float64)
    write = pi[0] * torch.outer(k, v) + pi[1] * torch.diag(d)
    write = write + pi[2] * (torch.outer(k, v) + torch.outer(v, k)) / 2
    expected = rho * before + (1 - rho) * write
    y, final_state = scan_matrix_state(
        *(x.view(1, 1, 1, 2) for x in (q, k, v, d)),
        torch.tensor(rho, dtype=torch.float64).log().view(1, 1, 1),
        pi.view(1, 1, 1, 3),
        initial_state=before.view(1, 1, 2, 2),
        backend=backend,
    )
    torch.testing.assert_close(final_state[0, 0], expected)
    torch.testing.assert_close(y[0, 0, 0], expected @ q)


@pytest.mark.parametrize("backend", list_backends("matrix_state"))
def test_delta_rule_replaces_what_the_address_held(backend: str) -> None:
    """(E18): a second payload at the same address takes the place of the first; others stay."""
    payloads = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], dtype=torch.float64)
    addresses = torch.tensor([[1.0, 0.0], [0.6, 0.8], [1.0, 0.0]], dtype=torch.float64)
    strength = torch.tensor([1.0, 0.5, 1.0], dtype=torch.float64)
    y, final_state = scan_matrix_state(
        *(x.view(1, 3, 1, 2) for x in (addresses, payloads, addresses)),
        None,
        torch.zeros(1, 3, 1, dtype=torch.float64),
        None,
        write_strength=strength.view(1, 3, 1),
        backend=backend,
    )
    S = torch.outer(payloads[0], addresses[0])
    S = S + 0.5 * torch.outer(payloads[1] - S @ addresses[1], addresses[1])
    S = S + torch.outer(payloads[2] - S @ addresses[2], addresses[2])
    torch.testing.assert_close(final_state[0, 0], S)
    torch.testing.assert_close(y[0, 0, 0], payloads[0])
    torch.testing.assert_close(y[0, 2, 0], payloads[2])
    torch.testing.assert_close(S @ torch.tensor([1.0, 0.0], dtype=torch.float64), payloads[2])


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_norm_guard_acts_only_above_one(backend: str) -> None:
    """(E3)."""
    small = draw_leaves(40, initial=False)
    small |= {name: 0.1 * small[name] for name in ("k", "v", "d")}
    for name, value in scan(backend, **small, norm_guard=True).items():
        assert torch.equal(value, scan(backend, **small)[name])

    large = draw_leaves(40)
    large |= {name: 9 * large[name] for name in ("k", "v", "d")}
    large["log_retention"] = large["log_retention"].clamp(max=-0.5)
    norms = torch.linalg.matrix_norm(scan(backend, **large)["final_state"])
    guarded = scan(backend, **large, norm_guard=True)["final_state"]
    assert norms.min() > 2
    torch.testing.assert_close(torch.linalg.matrix_norm(guarded), torch.ones_like(norms))


def test_norm_guard_passes_the_gradient_through_the_norm() -> None:
    """A state on the unit sphere does not grow, so its gradient has no radial part."""
    leaves = draw_leaves(1, rule="outer", initial=False)
    leaves["k"] = 9 * leaves["k"] / leaves["k"].norm(dim=-1, keepdim=True)
    leaves["log_retention"] = torch.full_like(leaves["log_retention"], -torch.inf)
    k = leaves["k"].requires_grad_()
    for backend in ("reference", "native"):
        out = scan(backend, **leaves, norm_guard=True)
        (grad,) = torch.autograd.grad(out["final_state"].sum() + out["y"].sum(), k)
        assert grad.abs().max() > 1e-3
        assert (grad * k).sum(-1).abs().max() < 1e-12


@pytest.mark.parametrize("scale", [0.05, 20.0])
def test_norm_guard_at_any_size_of_state(scale: float) -> None:
    leaves = draw_leaves(70)
    leaves |= {name: scale * leaves[name] for name in ("k", "initial_state")}
    compare("native", leaves, norm_guard=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("backend", "rule", "norm_guard"), CANDIDATES)
def test_extreme_retention(backend: str, rule: str, norm_guard: bool, dtype: torch.dtype) -> None:
    """Retention near 1 and near 0 side by side; 0 itself may come as -inf."""
    leaves = draw_leaves(100, rule=rule, dtype=dtype)
    values = torch.tensor([-1e-3, -1e-6, -50.0, -1e-2, -1.0, -200.0], dtype=dtype)
    leaves["log_retention"] = values[torch.arange(B * 100 * H).view(B, 100, H) ** 2 % 17 % 6]
    if norm_guard:  # off the kink at norm 1, where the gradient is not defined
        leaves["k"] = 0.2 * leaves["k"]
    compare(backend, leaves, norm_guard=norm_guard)
    for value in (-1e-4, -50.0, -torch.inf):
        leaves["log_retention"] = torch.full((B, 100, H), value, dtype=dtype)
        leaves["log_retention"][:, 70] = -1.0  # sets the scale that errors are measured by
        compare(backend, leaves, norm_guard=norm_guard)


@pytest.mark.parametrize("backend", list_backends("matrix_state"))
def test_full_retention_keeps_the_state(backend: str) -> None:
    leaves = draw_leaves(70) | {"log_retention": torch.zeros(B, 70, H, dtype=torch.float64)}
    assert torch.equal(scan(backend, **leaves)["final_state"], leaves["initial_state"])


@pytest.mark.parametrize(("backend", "rule", "norm_guard"), FORMS)
def test_gradcheck(backend: str, rule: str, norm_guard: bool) -> None:
    leaves = draw_leaves(4, rule=rule, sizes=(1, 1, N))
    given = {name: x.requires_grad_() for name, x in leaves.items()}

    def run(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        named = leaves | dict(zip(given, values, strict=True))
        out = scan(backend, **named, norm_guard=norm_guard, chunk_size=2)
        return out["y"], out["final_state"]

    assert torch.autograd.gradcheck(run, tuple(given.values()))


@pytest.mark.parametrize("split", [1, 64, 80])
@pytest.mark.parametrize(("backend", "rule", "norm_guard"), FORMS)
def test_two_passes_equal_one(backend: str, rule: str, norm_guard: bool, split: int) -> None:
    leaves = draw_leaves(100, rule=rule)
    given = [x.requires_grad_() for x in leaves.values()]
    initial = leaves.pop("initial_state")
    whole = scan(backend, **leaves, initial_state=initial, norm_guard=norm_guard)
    parts, carried = [], initial
    for part in (slice(None, split), slice(split, None)):
        tokens = {name: x[:, part] for name, x in leaves.items()}
        out = scan(backend, **tokens, initial_state=carried, norm_guard=norm_guard)
        carried = out["final_state"]
        parts.append(out["y"])
    pieces = {"y": torch.cat(parts, 1), "final_state": carried}
    for name in whole:
        assert error(pieces[name], whole[name]) <= limit("matrix_state", torch.float64, "value")
    weights = {name: torch.linspace(-1, 2, x.numel()).view(x.shape) for name, x in whole.items()}
    grads = [
        torch.autograd.grad(sum((out[name] * weights[name]).sum() for name in out), given)
        for out in (pieces, whole)
    ]
    for actual, expected in zip(*grads, strict=True):
        assert error(actual, expected) <= limit("matrix_state", torch.float64, "grad")


@pytest.mark.parametrize(("backend", "rule", "norm_guard"), FORMS)
def test_padding_is_not_there(backend: str, rule: str, norm_guard: bool) -> None:
    """Whatever padding holds, NaN too, states stay bitwise, readouts and gradients are zero."""
    leaves = draw_leaves(70, rule=rule)
    leaves["initial_state"] = 9 * leaves["initial_state"]  # a second norm guard would show
    lengths = draw_lengths(70)
    padded = torch.arange(70) >= lengths[:, None]
    initial = leaves.pop("initial_state")
    outs = []
    for garbage in (0.5, torch.nan):
        tokens = {
            name: x.masked_fill(padded[..., *[None] * (x.dim() - 2)], garbage)
            for name, x in leaves.items()
        }
        given = [x.requires_grad_() for x in tokens.values()]
        out = scan(backend, **tokens, initial_state=initial, lengths=lengths, norm_guard=norm_guard)
        grads = torch.autograd.grad(out["y"].sum() + out["final_state"].sum(), given)
        for grad in grads:
            assert grad.isfinite().all()
            assert (grad[padded] == 0).all()
        assert (out["y"][padded] == 0).all()
        assert torch.equal(out["final_state"][1], initial[1])
        outs.append(out)
    for name, value in outs[0].items():
        assert torch.equal(value, outs[1][name])


@pytest.mark.parametrize(
    ("backend", "rule", "norm_guard"), [form for form in FORMS if form[0] != "parallel"]
)
def test_padded_row_equals_short_row(backend: str, rule: str, norm_guard: bool) -> None:
    leaves = draw_leaves(70, rule=rule)
    short = {name: x if name == "initial_state" else x[:, :35] for name, x in leaves.items()}
    expected = scan(backend, **short, norm_guard=norm_guard)["final_state"]
    lengths = torch.full((B,), 35)
    actual = scan(backend, **leaves, lengths=lengths, norm_guard=norm_guard)["final_state"]
    assert torch.equal(actual, expected)


@pytest.mark.parametrize(("backend", "rule", "norm_guard"), FORMS)
def test_low_precision_is_computed_in_float32(backend: str, rule: str, norm_guard: bool) -> None:
    leaves = draw_leaves(65, rule=rule, dtype=torch.bfloat16)
    given = [x.requires_grad_() for x in leaves.values()]
    out = scan(backend, **leaves, norm_guard=norm_guard)
    assert out["y"].dtype == torch.bfloat16
    assert out["final_state"].dtype == torch.float32
    wide = {name: x.detach().float() for name, x in leaves.items()}
    expected = scan(backend, **wide, norm_guard=norm_guard)
    assert torch.equal(out["final_state"], expected["final_state"])
    assert torch.equal(out["y"], expected["y"].bfloat16())
    for grad in torch.autograd.grad(out["y"].sum(), given, allow_unused=True):
        assert grad.dtype == torch.bfloat16
        assert grad.isfinite().all()


@pytest.mark.parametrize(("backend", "rule", "norm_guard"), FORMS)
def test_autocast_does_not_reach_the_products(backend: str, rule: str, norm_guard: bool) -> None:
    leaves = draw_leaves(65, rule=rule, dtype=torch.float32)
    expected = scan(backend, **leaves, norm_guard=norm_guard)
    with torch.autocast("cpu", torch.bfloat16):
        actual = scan(backend, **leaves, norm_guard=norm_guard)
    for name, value in expected.items():
        assert torch.equal(actual[name], value)


@pytest.mark.parametrize("backend", candidates("matrix_state"))
def test_views_and_expanded_cotangents(backend: str) -> None:
    """Inputs need not be contiguous, nor the gradient of the output."""
    leaves = draw_leaves(70)
    fused = torch.cat([leaves[name] for name in "qkvd"], dim=-1)

    def run(backend: str, fused: torch.Tensor, log_retention: torch.Tensor, **rest) -> Outputs:
        q, k, v, d = fused.split(N, dim=-1)
        flipped = log_retention.mT.contiguous().mT
        out = scan(backend, q=q, k=k, v=v, d=d, log_retention=flipped, **rest)
        return {"total": out["y"].sum() + out["final_state"].sum()}

    rest = {name: leaves[name] for name in ("log_retention", "rule_weights", "initial_state")}
    compare_with_reference("matrix_state", backend, run, {"fused": fused, **rest})


@pytest.mark.parametrize(("backend", "rule", "norm_guard"), FORMS)
def test_inputs_stay_and_outputs_are_new(backend: str, rule: str, norm_guard: bool) -> None:
    leaves = draw_leaves(3, rule=rule)
    copies = {name: x.clone() for name, x in leaves.items()}
    out = scan(backend, **leaves, lengths=torch.tensor([3, 0, 1]), norm_guard=norm_guard)
    for value in out.values():
        value.zero_()
    for name, x in leaves.items():
        assert torch.equal(x, copies[name])


def test_no_gradient_no_saved_states() -> None:
    leaves = draw_leaves(65)
    leaves["q"].requires_grad_()
    with torch.no_grad():
        out = scan("native", **leaves)
    assert not out["y"].requires_grad
    leaves["q"].requires_grad_(False)
    assert torch.equal(scan("native", **leaves)["y"], out["y"])


def test_auto_is_the_chosen_backend() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert choose_backend(1, cpu) == choose_backend(1, cuda) == "reference"
    assert choose_backend(2, cpu) == choose_backend(512, cpu, norm_guard=True) == "native"
    assert choose_backend(512, cuda, norm_guard=True) == "reference"
    for num_tokens, norm_guard in itertools.product((1, 2, 65), (False, True)):
        leaves = draw_leaves(num_tokens)
        chosen = choose_backend(num_tokens, cpu, norm_guard=norm_guard)
        for name, value in scan("auto", **leaves, norm_guard=norm_guard).items():
            assert torch.equal(value, scan(chosen, **leaves, norm_guard=norm_guard)[name])


@pytest.mark.parametrize("compiles", [False, True])
def test_auto_on_a_gpu(compiles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix_state, "compiles_triton", lambda device: compiles)
    cuda = torch.device("cuda")
    assert choose_backend(512, cuda, head_dim=128) == ("triton" if compiles else "parallel")
    assert choose_backend(512, cuda, head_dim=129) == "parallel"
    assert choose_backend(512, cuda, is_delta=True) == "parallel"
    assert choose_backend(512, cuda, is_double=True) == "parallel"


def test_decoding_loads_no_compiler() -> None:
    code = (
        "import sys, torch\n"
        "from unimatrix.ops.matrix_state import scan_matrix_state\n"
        "x = torch.ones(1, 1, 2, 3)\n"
        "scan_matrix_state(x, x, x, None, -torch.ones(1, 1, 2), None, norm_guard=True)\n"
        "assert 'numba' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "parallel", "norm_guard": True}, "no norm_guard"),
        ({"backend": "triton", "norm_guard": True}, "'triton' has no norm_guard"),
        ({"backend": "tritn"}, "Did you mean 'triton'"),
        ({"backend": "parrallel"}, "Did you mean 'parallel'"),
        ({"d": None}, "rule_weights is given but d is None"),
        ({"rule_weights": None}, "d is given but rule_weights is None"),
        ({"rule_weights": torch.ones(B, 4, H, 2)}, "2 rules; pass outer, diagonal and symmetric"),
        ({"q": torch.ones(B, 4, H)}, r"q has shape \[3, 4, 2\]"),
        ({"q": torch.ones(B, 0, H, N)}, "no empty dimension"),
        ({"q": torch.ones(B, 4, H, N, dtype=torch.int64)}, "pass a floating tensor"),
        ({"k": torch.ones(B, 4, H, N + 1)}, "k has shape"),
        ({"v": torch.ones(B, 5, H, N)}, "v has shape"),
        ({"log_retention": torch.ones(B, 4, H, 1)}, "log_retention has shape"),
        ({"initial_state": torch.ones(B, H, N)}, "initial_state has shape"),
        ({"lengths": torch.ones(B + 1, dtype=torch.int64)}, "lengths has shape"),
        ({"lengths": torch.ones(B, dtype=torch.int32)}, "pass torch.int64"),
        ({"lengths": torch.tensor([0, 4, 5])}, r"from 0 to 5; pass values in 0..4"),
        ({"lengths": torch.tensor([0, -1, 4])}, r"from -1 to 4; pass values in 0..4"),
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"write_strength": torch.ones(B, 4, H)}, "write_strength and rule_weights are given"),
        (
            {
                "d": None,
                "rule_weights": None,
                "write_strength": torch.ones(B, 4, H),
                "norm_guard": True,
            },
            "leave it out with write_strength",
        ),
    ],
)
def test_refuses(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        scan(**({"backend": "auto"} | draw_leaves(4) | change))


def test_native_refuses_other_devices() -> None:
    meta = {name: x.to("meta") for name, x in draw_leaves(4).items()}
    with pytest.raises(InputError, match="runs on the CPU, not on meta"):
        scan("native", **meta)
    assert scan("auto", **meta)["y"].shape == (B, 4, H, N)


# The projections of a layer: bound, scanned and normalised together.


def draw_vectors(num_tokens: int, num_vectors: int, dtype: torch.dtype) -> Leaves:
    """Return projections and controls before any activation, and a state."""
    generator = torch.Generator().manual_seed(num_tokens)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "vectors": draw(B, num_tokens, num_vectors, H, N),
        "controls": 2 * draw(B, num_tokens, H * (4 if num_vectors == 4 else 1)),
        "initial_state": 0.3 * draw(B, H, N, N),
    }


def scan_vectors(
    unit: bool, lengths: torch.Tensor | None, backend: str, vectors, controls, initial_state
) -> Outputs:
    """Bind, scan and normalise: as the equations say, or in one pass."""
    if backend == "native":
        y, state = bind_and_scan(
            vectors, controls, unit=unit, initial_state=initial_state, lengths=lengths
        )
        return {"y": y, "final_state": state}
    bound = normalize(vectors, dim=-1) if unit else vectors.tanh()
    q, k, v, *rest = bound.unbind(2)
    retention, rules = controls[..., :H], controls[..., H:].unflatten(-1, (H, -1))
    y, state = scan_matrix_state(
        q,
        k,
        v,
        rest[0] if rest else None,
        logsigmoid(retention),
        rules.softmax(-1) if rest else None,
        initial_state=initial_state,
        lengths=lengths,
        backend=backend,
    )
    if unit:
        y = y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return {"y": y, "final_state": state}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 2, 64, 65, 130])
@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("num_vectors", [3, 4])
def test_projections(num_vectors: int, unit: bool, num_tokens: int, dtype: torch.dtype) -> None:
    for lengths in (None, draw_lengths(num_tokens)):
        leaves = draw_vectors(num_tokens, num_vectors, dtype)
        run = functools.partial(scan_vectors, unit, lengths)
        compare_with_reference("matrix_state", "native", run, leaves)


def test_a_vector_of_zeros_is_bound_to_zeros() -> None:
    leaves = draw_vectors(70, 4, torch.float64)
    leaves["vectors"][:, ::3] = 0.0
    leaves["vectors"][:, 1::5] *= 1e-14
    run = functools.partial(scan_vectors, True, None)
    compare_with_reference("matrix_state", "native", run, leaves)


def test_projections_that_do_not_fit() -> None:
    leaves = draw_vectors(4, 4, torch.float64)
    with pytest.raises(InputError, match="and 4 numbers for each of 2 heads"):
        bind_and_scan(leaves["vectors"], leaves["controls"][..., :-1], unit=True)
    with pytest.raises(InputError, match="5 vectors a head"):
        bind_and_scan(leaves["vectors"][:, :, [0, 1, 2, 3, 3]], leaves["controls"], unit=True)
