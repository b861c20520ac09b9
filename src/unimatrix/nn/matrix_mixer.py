"""Projections and gate around the matrix state."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, normalize, rms_norm

from unimatrix.configuration import UniMatrixConfig
from unimatrix.nn.short_convolution import ShortConvolution
from unimatrix.ops.matrix_state import scan_matrix_state

NUM_RULES = 3
# Small beside the square of a read-out, which a long retention makes small.
_READOUT_EPS = 1e-6


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

    Equation: E1 to E4, E18, E19, and the gate of E11.
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
            self.diag_proj = nn.Linear(width, inner, bias=False)
            # It exists because published counts and checkpoints have it. Frozen where unused, so
            # that data-parallel training does not wait for a gradient that never comes.
            self.diag_proj.requires_grad_(self.mixes_rules)
        if self.mixes_rules:
            self.rule_proj = nn.Linear(width, self.num_heads * NUM_RULES)
        self.retention_proj = RetentionProjection(width, self.num_heads, config.longest_retention)
        self.out_proj = nn.Linear(inner, width, bias=False)
        self.residual_gate = nn.Linear(width, width)
        self.short_conv = None
        if config.conv_kernel:
            self.short_conv = ShortConvolution(width, config.conv_kernel)

    def forward(
        self,
        h: Tensor,
        matrix_state: Tensor | None,
        recent: Tensor | None,
        lengths: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the gated readout, and the state after the last real token.

        Args:
            h: [B, T, D], normalised stream of this depth step.
            matrix_state: [B, H, N, N] before the first token; ``None`` is zero.
            recent: what the short convolution needs of the tokens before; ``None`` is zeros.
            lengths: [B] int64, real tokens of each row; ``None`` is T for all.

        Returns:
            [B, T, D] in the dtype of ``h``; [B, H, N, N], float32 at least; ``recent`` afterwards,
            ``None`` without a short convolution.
        """
        source = h
        if self.short_conv is not None:
            source, recent = self.short_conv(h, recent, lengths)
        heads = (*h.shape[:2], self.num_heads, self.head_dim)
        q = self._bound(self.q_proj(source).view(heads))  # [B, T, H, N]
        k = self.k_proj(source).view(heads)  # [B, T, H, N]
        v = self._bound(self.v_proj(source).view(heads))  # [B, T, H, N]
        d, rule_weights, write_strength = None, None, None
        if self.write_proj is not None:
            write_strength = torch.sigmoid(self.write_proj(h))  # [B, T, H]
        else:
            k = self._bound(k)
        if self.mixes_rules:
            d = self._bound(self.diag_proj(source).view(heads))  # [B, T, H, N]
            rules = self.rule_proj(h).view(*h.shape[:2], self.num_heads, NUM_RULES)
            rule_weights = rules.softmax(dim=-1)  # [B, T, H, R]
        y, final_state = scan_matrix_state(
            q,
            k,
            v,
            d,
            logsigmoid(self.retention_proj(h)),  # [B, T, H]
            rule_weights,
            write_strength=write_strength,
            initial_state=matrix_state,
            lengths=lengths,
            norm_guard=self.norm_guard,
            backend=self.backend,
        )
        if self.normalized_keys:
            y = rms_norm(y, y.shape[-1:], eps=_READOUT_EPS)
        readout = self.out_proj(y.flatten(2))  # [B, T, D]
        return torch.sigmoid(self.residual_gate(h)) * readout, final_state, recent

    def _bound(self, projected: Tensor) -> Tensor:
        """Return unit vectors per head, or each number through tanh as in the paper."""
        if self.normalized_keys:
            return normalize(projected, dim=-1)
        return torch.tanh(projected)
