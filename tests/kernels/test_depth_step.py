"""A depth step as one operator: against its modules, in value and gradient."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from tests.models import build_model
from tests.ops.oracle import Outputs, compare_with_reference
from unimatrix.kernels.block import build_block_run
from unimatrix.nn.block import States, UniMatrixBlock
from unimatrix.nn.matrix_mixer import MatrixState
from unimatrix.nn.mixer import Read, Tokens
from unimatrix.ops.numba.tiles import TILE

SIZES = {"hidden_size": 16, "num_attention_heads": 2, "head_dim": 8, "slot_key_size": 16}
# Without associations and with, squashed vectors and unit vectors, one rule and all, a convolution.
VARIANTS = ("core", "core+mixed", "core+conv", "core+suffix_automaton", "selective")
PARTS = ("y", "matrix_state", "recent")


@pytest.fixture(autouse=True)
def _poison_empty_tensors():
    """Fill every ``torch.empty`` with NaN: nothing may be read that was not written."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class TwoSteps(nn.Module):
    """A block applied twice, so that gradients of what both read are summed."""

    def __init__(self, block: UniMatrixBlock, *, is_compiled: bool) -> None:
        super().__init__()
        self.block = block
        self.is_compiled = is_compiled

    def forward(self, x: Tensor, tokens: Tokens, carry: States) -> tuple[Tensor, States]:
        """Return the stream and what the second step carries on."""
        apply: Any = self.block
        if self.is_compiled:
            reasons: dict[str, str] = {}
            weight = self.block.ffn_norm.weight
            apply = build_block_run(self.block, weight, x.shape[1], float("inf"), reasons)
            assert not reasons
        x, carry, _ = apply(x, tokens, carry)
        x, carry, _ = apply(x, tokens, carry)
        return x, carry


def run_block(
    variant: str,
    lengths: Tensor | None,
    kept: tuple[str, ...],
    backend: str,
    x: Tensor,
    recent: Tensor | None,
    state: Tensor | None,
    residual: Tensor | None,
    retrieved: Tensor | None,
    **weights: Tensor,
) -> Outputs:
    """Return some of what a block leaves after two steps, given all that it takes."""
    model = build_model(variant, dtype=x.dtype, dropout=0.0, **SIZES)
    model.set_backend({"matrix_state": backend})
    steps = TwoSteps(model.model.block, is_compiled=backend == "native")
    ids = torch.zeros(x.shape[:2], dtype=torch.int64)
    contexts = {"selective_mixer": retrieved, "residual_context": residual}
    reads = {name: Read(context) for name, context in contexts.items() if context is not None}
    counts = torch.zeros(2, dtype=torch.int64)
    tokens = Tokens(ids, x, steps, lengths, counts, counts, reads=reads)
    carry = {} if state is None else {"matrix_mixer": MatrixState(state, recent)}
    named = {f"block.{name.replace('__', '.')}": weight for name, weight in weights.items()}
    y, carry = functional_call(steps, named, (x, tokens, carry))
    if lengths is not None:  # what stands at padding means nothing
        y = y * (torch.arange(x.shape[1]) < lengths.unsqueeze(1)).unsqueeze(-1)
    found = {"y": y, **carry["matrix_mixer"]._asdict()}
    return {part: found[part] for part in kept}


def draw_leaves(
    variant: str, dtype: torch.dtype, num_tokens: int, *, carries: bool
) -> dict[str, Tensor | None]:
    """Return what a block takes, two rows of so many tokens."""
    model = build_model(variant, dtype=dtype, dropout=0.0, **SIZES)
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    config, width = model.config, SIZES["hidden_size"]
    heads, size = SIZES["num_attention_heads"], SIZES["head_dim"]
    has_residual = config.residual_path != "none"
    has_reads = config.associative_memory != "none"
    num_before = config.conv_kernel - 1 if config.conv_kernel and carries else None
    return {
        "x": draw(2, num_tokens, width),
        "recent": None if num_before is None else draw(2, num_before, width),
        "state": draw(2, heads, size, size) / size if carries else None,
        "residual": draw(2, num_tokens, width) if has_residual else None,
        "retrieved": draw(2, num_tokens, width) if has_reads else None,
        # A name with a dot is no argument.
        **{
            name.replace(".", "__"): parameter.detach()
            for name, parameter in model.model.block.named_parameters()
        },
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("carries", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_is_its_parts(variant: str, carries: bool, dtype: torch.dtype) -> None:
    for num_tokens in (9, TILE + 5):
        leaves = draw_leaves(variant, dtype, num_tokens, carries=carries)
        run = functools.partial(run_block, variant, None, PARTS)
        compare_with_reference("fused_passes", "native", run, leaves)


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_of_their_own_lengths(variant: str) -> None:
    leaves = draw_leaves(variant, torch.float64, 40, carries=True)
    run = functools.partial(run_block, variant, torch.tensor([40, 17]), PARTS)
    compare_with_reference("fused_passes", "native", run, leaves)


@pytest.mark.parametrize("kept", [("y",), ("matrix_state",), ("recent",)])
def test_what_is_not_used_afterwards_sends_no_gradient(kept: tuple[str, ...]) -> None:
    leaves = draw_leaves("selective", torch.float64, 40, carries=True)
    run = functools.partial(run_block, "selective", None, kept)
    compare_with_reference("fused_passes", "native", run, leaves)


def test_a_step_without_gradient_is_the_same() -> None:
    leaves = draw_leaves("selective", torch.float64, 40, carries=True)
    run = functools.partial(run_block, "selective", None, PARTS, "native")
    with torch.no_grad():
        apart = run(**leaves)
    recorded = run(**{name: leaf.clone().requires_grad_() for name, leaf in leaves.items()})
    for name, value in recorded.items():
        assert value.requires_grad
        assert not apart[name].requires_grad
        assert torch.equal(apart[name], value)
