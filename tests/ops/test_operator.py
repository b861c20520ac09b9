"""``declare_operator``: one declaration, called eagerly and captured in a graph."""

import torch
from torch import Tensor

from unimatrix.ops.operator import declare_operator

calls: list[str] = []


def forward(
    x: Tensor, h: Tensor, shift: Tensor | None, power: int, *, saves: bool
) -> tuple[Tensor, Tensor]:
    calls.append(f"forward, saves={saves}")
    powers = h**power
    y = x + powers if shift is None else x + powers + shift
    return y, powers if saves else h.new_empty(0)


def backward(h: Tensor, powers: Tensor, power: int, dy: Tensor) -> tuple[Tensor, Tensor]:
    calls.append("backward")
    return dy * power * powers / h, dy.clone()


add_power = declare_operator(
    "test_add_power",
    forward,
    backward=backward,
    results="y",
    saved="powers",
    residual="x",
    gradients="h shift",
    shapes=lambda x, h, shift, power: (x.new_empty(x.shape), h.new_empty(h.shape)),
    gradient_shapes=lambda h, *_: (h.new_empty(h.shape), h.new_empty(h.shape)),
)


def draw_inputs(has_shift: bool) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    x, h, shift = torch.rand(3, 5, generator=generator, dtype=torch.float64) + 1
    return [x.requires_grad_(), h.requires_grad_(), shift.requires_grad_() if has_shift else None]


def differentiate(run, has_shift: bool) -> list[Tensor | None]:
    """Return the result and the gradients."""
    inputs = draw_inputs(has_shift)
    y = run(*inputs, 3)
    (y * torch.arange(5)).sum().backward()
    return [y.detach(), *(None if x is None else x.grad for x in inputs)]


def compare(found: list[Tensor | None], has_shift: bool) -> None:
    def compose(x: Tensor, h: Tensor, shift: Tensor | None, power: int) -> Tensor:
        return x + h**power + (0 if shift is None else shift)

    for actual, expected in zip(found, differentiate(compose, has_shift), strict=True):
        assert (actual is None) == (expected is None)
        assert actual is None or torch.allclose(actual, expected, rtol=1e-12)


def test_eager_calls_save_only_for_a_backward_pass() -> None:
    calls.clear()
    for has_shift in (False, True):
        compare(differentiate(add_power, has_shift), has_shift)
    assert calls == 2 * ["forward, saves=True", "backward"]
    calls.clear()
    with torch.no_grad():
        assert not add_power(*draw_inputs(True), 2).requires_grad
    add_power(*(x if x is None else x.detach() for x in draw_inputs(False)), 2)
    assert calls == 2 * ["forward, saves=False"]


def test_a_graph_has_one_node() -> None:
    torch.compiler.reset()
    captured = torch.compile(add_power, backend="aot_eager", fullgraph=True)
    for has_shift in (False, True):
        compare(differentiate(captured, has_shift), has_shift)
    found = torch.library.opcheck(torch.ops.unimatrix.test_add_power, (*draw_inputs(True), 3))
    assert set(found.values()) == {"SUCCESS"}


def test_gradients_of_unused_results_are_none_where_that_is_allowed() -> None:
    seen: list[tuple[bool, bool]] = []

    def split(x: Tensor) -> tuple[Tensor, Tensor]:
        return 2 * x, 3 * x

    def join(x: Tensor, dtwice: Tensor | None, dthrice: Tensor | None) -> tuple[Tensor]:
        seen.append((dtwice is None, dthrice is None))
        return (sum(n * g for n, g in ((2, dtwice), (3, dthrice)) if g is not None),)

    run = declare_operator(
        "test_split", split, backward=join, results="twice thrice", gradients="x"
    )
    x = torch.ones(3, requires_grad=True)
    run(x)[1].sum().backward()
    assert seen == [(True, False)]
    assert torch.equal(x.grad, torch.full((3,), 3.0))
