"""The feed-forward networks of a depth step."""

from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn.functional import gelu

from unimatrix.configuration import UniMatrixConfig
from unimatrix.nn.norm import RowNorm
from unimatrix.nn.packed_linear import apply_together, is_bare, is_plain
from unimatrix.ops.fused_passes import apply_gated_unit, fuses_products

if TYPE_CHECKING:
    from unimatrix.ops.fused_passes.feed_forward_native import PreparedFeedForward


class FeedForward(nn.Module):
    """Apply Linear(D, F), GELU (erf), dropout, Linear(F, D).

    Args:
        config: uses D, F and ``dropout``.
    """

    def __init__(self, config: UniMatrixConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)

    @property
    def up_projs(self) -> list[nn.Linear]:
        """The layers that see the input."""
        return [self.up_proj]

    def forward(self, h: Tensor) -> Tensor:
        """Return the network's output, [B, T, D] for [B, T, D]."""
        output: Tensor = self.down_proj(self.dropout(gelu(self.up_proj(h))))
        return output


class GatedFeedForward(nn.Module):
    """Apply Linear(D, F) * SiLU(Linear(D, F)), dropout, Linear(F, D), without biases.

    Equation: E23.
    Source: Shazeer 2020 (arXiv:2002.05202), SwiGLU.

    Args:
        config: uses D, F and ``dropout``.
    """

    def __init__(self, config: UniMatrixConfig) -> None:
        super().__init__()
        self.backend = "auto"
        width, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    @property
    def up_projs(self) -> list[nn.Linear]:
        """The layers that see the input."""
        return [self.gate_proj, self.up_proj]

    def forward(self, h: Tensor) -> Tensor:
        """Return the network's output, [B, T, D] for [B, T, D]."""
        gate_and_up = apply_together(self.up_projs, h)  # [B, T, 2 F]
        inner = apply_gated_unit(gate_and_up, backend=self.backend)  # [B, T, F]
        output: Tensor = self.down_proj(self.dropout(inner))
        return output


def fuse_feed_forward(
    norm: nn.Module, network: FeedForward | GatedFeedForward, x: Tensor, backend: str
) -> "PreparedFeedForward | None":
    """Return norm and network as one compiled pass; ``None`` where they are to be called.

    That is where a module is more than its weights, drops features, or is too large or not where
    the pass runs (``fuses_products``).

    Args:
        norm: of ``build_norm``.
        network: without the residual sum.
        x: [..., D], the stream, or one like it.
        backend: of the fused passes.
    """
    layers = [*network.up_projs, network.down_proj]
    whole = [norm, network, network.dropout]
    if not (all(map(is_bare, whole)) and all(map(is_plain, layers))):
        return None
    if not isinstance(norm, RowNorm | nn.LayerNorm) or (network.training and network.dropout.p):
        return None
    up = [layer.weight for layer in network.up_projs]
    if not fuses_products(x, [norm.weight, *up, network.down_proj.weight], backend):
        return None
    # Imported here: it loads the compiler.
    from unimatrix.ops.fused_passes.feed_forward_native import prepare

    assert norm.eps is not None
    shift = norm.bias if isinstance(norm, nn.LayerNorm) else None
    down = network.down_proj
    return prepare(
        norm.weight, shift, norm.eps, up, network.up_projs[0].bias, down.weight, down.bias
    )


def build_feed_forward(config: UniMatrixConfig) -> FeedForward | GatedFeedForward:
    """Return the feed-forward network that a configuration names."""
    return GatedFeedForward(config) if config.feed_forward_type == "swiglu" else FeedForward(config)
