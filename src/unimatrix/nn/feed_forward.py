"""What a depth step does to each position alone: its norms and feed-forward networks."""

from torch import Tensor, nn
from torch.nn.functional import gelu, silu

from unimatrix.configuration import UniMatrixConfig


def build_norm(config: UniMatrixConfig) -> nn.LayerNorm | nn.RMSNorm:
    """Return a new norm of the residual stream (E22): ``layer_norm`` or ``rms_norm``."""
    kind = nn.RMSNorm if config.norm_type == "rms_norm" else nn.LayerNorm
    return kind(config.hidden_size, eps=config.layer_norm_eps)


class FeedForward(nn.Module):
    """Apply Linear(D, F), GELU (erf), dropout, Linear(F, D).

    Equation: E23.

    Args:
        config: uses D, F and ``dropout``.
    """

    def __init__(self, config: UniMatrixConfig) -> None:
        super().__init__()
        self.inner_size = config.intermediate_size
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
        width, inner = config.hidden_size, config.intermediate_size
        self.inner_size = inner
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
        inner = silu(self.gate_proj(h)) * self.up_proj(h)  # [B, T, F]
        output: Tensor = self.down_proj(self.dropout(inner))
        return output


def build_feed_forward(config: UniMatrixConfig) -> FeedForward | GatedFeedForward:
    """Return the feed-forward network that a configuration names."""
    return GatedFeedForward(config) if config.feed_forward_type == "swiglu" else FeedForward(config)
