"""Projections around the matrix state."""

import math

import torch
from torch import Tensor, nn

from unimatrix.configuration import UniMatrixConfig
from unimatrix.nn.packed_linear import PackedWeights, apply_together, pack
from unimatrix.nn.short_convolution import ShortConvolution
from unimatrix.ops.matrix_state import scan_projected

NUM_RULES = 3


class RetentionProjection(nn.Linear):
    """The logit of every head's retention.

    A module of its own, because transformers initialises none without parameters of its own.

    Args:
        width: D.
        num_heads: H.
        longest_retention: tokens that the last head starts with; ``None`` starts all at one half.
    """

    def __init__(self, width: int, num_heads: int, longest_retention: int | None) -> None:
        super().__init__(width, num_heads)
        self.longest_retention = longest_retention

    def list_starts(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Return the parameters that start elsewhere: the bias, spread over time scales."""
        if self.longest_retention is None:
            return []
        longest = math.log2(self.longest_retention)
        scales = torch.logspace(1, longest, self.out_features, base=2.0)
        # sigmoid(ln(n - 1)) = 1 - 1 / n
        return [(self.bias, (scales - 1).clamp_min(1e-3).log())]


class MatrixMixer(nn.Module):
    """Mix tokens through one matrix state per head.

    Equation: E1 to E4, E18, E19, E24.
    Source: paper, section on the hybrid state update; ``docs/deviations.md`` D1 and D7.

    Args:
        config: uses D, H, N, ``update_rules``, ``conv_kernel``, ``norm_guard``, ``normalized_keys``
            and ``longest_retention``.
    """

    def __init__(self, config: UniMatrixConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.head_dim = config.head_dim
        self.norm_guard = config.norm_guard
        self.normalized_keys = config.normalized_keys
        self.mixes_rules = config.update_rules == "mixed"
        self.uses_delta = config.update_rules == "delta"
        self.backend = "auto"
        width, inner = config.hidden_size, self.num_heads * self.head_dim
        self.q_proj = nn.Linear(width, inner, bias=False)
        self.k_proj = nn.Linear(width, inner, bias=False)
        self.v_proj = nn.Linear(width, inner, bias=False)
        self.write_proj = nn.Linear(width, self.num_heads) if self.uses_delta else None
        if not self.uses_delta:
            # It exists because published counts and checkpoints have it.
            self.diag_proj = nn.Linear(width, inner, bias=False)
            self.freeze_unused()
        if self.mixes_rules:
            self.rule_proj = nn.Linear(width, self.num_heads * NUM_RULES)
        self.retention_proj = RetentionProjection(width, self.num_heads, config.longest_retention)
        self.out_proj = nn.Linear(inner, width, bias=False)
        self.residual_gate = nn.Linear(width, width)
        self.short_conv = None
        if config.conv_kernel:
            self.short_conv = ShortConvolution(width, config.conv_kernel)

    def freeze_unused(self) -> None:
        """Freeze a diagonal that no rule uses; data-parallel training would await its gradient."""
        if not self.uses_delta:
            self.diag_proj.requires_grad_(self.mixes_rules)

    @property
    def vector_layers(self) -> list[nn.Linear]:
        """Layers of what a token binds and asks for."""
        vectors = [self.q_proj, self.k_proj, self.v_proj]
        return [*vectors, self.diag_proj] if self.mixes_rules else vectors

    @property
    def control_layers(self) -> list[nn.Linear]:
        """Layers of what decides how it is written."""
        controls: list[nn.Linear] = [self.retention_proj]
        if self.mixes_rules:
            controls.append(self.rule_proj)
        if self.write_proj is not None:
            controls.append(self.write_proj)
        return controls

    @property
    def squashes(self) -> bool:
        """Whether every vector passes through tanh."""
        return not self.normalized_keys and not self.uses_delta

    def pack(self) -> tuple[PackedWeights | None, PackedWeights | None]:
        """Return the weights that ``forward`` applies together, for several depth steps."""
        return pack(self.vector_layers), pack(self.control_layers)

    def forward(
        self,
        h: Tensor,
        matrix_state: Tensor | None,
        recent: Tensor | None,
        lengths: Tensor | None,
        packed: tuple[PackedWeights | None, PackedWeights | None] = (None, None),
        projected: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the readout before ``out_proj``, and the state after the last real token.

        Args:
            h: [B, T, D], normalised stream of this depth step.
            matrix_state: [B, H, N, N] before the first token; ``None`` is zero.
            recent: what the short convolution needs of the tokens before; ``None`` is zeros.
            lengths: [B] int64, real tokens of each row; ``None`` is T for all.
            packed: from ``pack``.
            projected: what ``vector_layers`` behind the convolution and ``control_layers`` make of
                h, side by side, where that is known; the vectors squashed if ``squashes``.

        Returns:
            [B, T, H N] in the dtype of ``h``; [B, H, N, N], float32 at least; ``recent``
            afterwards, ``None`` without a short convolution.
        """
        if projected is not None:
            vectors, controls = projected
            recent = self.take_recent(h, recent, lengths)
        else:
            source = h
            if self.short_conv is not None:
                source, recent = self.short_conv(h, recent, lengths)
            vectors = apply_together(self.vector_layers, source, packed[0])  # [B, T, P H N]
            controls = apply_together(self.control_layers, h, packed[1])  # [B, T, C]
        y, final_state = scan_projected(
            vectors.view(*h.shape[:2], -1, self.num_heads, self.head_dim),
            controls,
            unit=self.normalized_keys,
            delta=self.uses_delta,
            bound=projected is not None and self.squashes,
            norm_guard=self.norm_guard,
            initial_state=matrix_state,
            lengths=lengths,
            backend=self.backend,
        )
        return y.flatten(2), final_state, recent

    def take_recent(
        self, h: Tensor, recent: Tensor | None, lengths: Tensor | None
    ) -> Tensor | None:
        """Return what the short convolution needs of these tokens in the next call, if it has one.

        The arguments are those of ``forward``.
        """
        if self.short_conv is None:
            return recent
        return self.short_conv.take_recent(h, recent, lengths)
