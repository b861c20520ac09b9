"""Projections and gate around the matrix state."""

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from unimatrix.configuration import UniMatrixConfig
from unimatrix.ops.matrix_state import scan_matrix_state

NUM_RULES = 3


class MatrixMixer(nn.Module):
    """Mix tokens through one matrix state per head.

    Equation: E1 to E4, and the gate of E11.
    Source: paper, section on the hybrid state update; ``docs/deviations.md`` D1 and D7.

    Args:
        config: uses D, H, N, ``update_rules`` and ``norm_guard``.
    """

    def __init__(self, config: UniMatrixConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.head_dim = config.head_dim
        self.norm_guard = config.norm_guard
        self.mixes_rules = config.update_rules == "mixed"
        self.backend = "auto"
        width, inner = config.hidden_size, self.num_heads * self.head_dim
        self.q_proj = nn.Linear(width, inner, bias=False)
        self.k_proj = nn.Linear(width, inner, bias=False)
        self.v_proj = nn.Linear(width, inner, bias=False)
        self.diag_proj = nn.Linear(width, inner, bias=False)
        if self.mixes_rules:
            self.rule_proj = nn.Linear(width, self.num_heads * NUM_RULES)
        else:
            # It exists because published counts and checkpoints have it. Frozen, so that
            # data-parallel training does not wait for a gradient that never comes.
            self.diag_proj.requires_grad_(False)
        self.retention_proj = nn.Linear(width, self.num_heads)
        self.out_proj = nn.Linear(inner, width, bias=False)
        self.residual_gate = nn.Linear(width, width)

    def forward(
        self, h: Tensor, matrix_state: Tensor | None, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the gated readout and the state after the last real token.

        Args:
            h: [B, T, D], normalised stream of this depth step.
            matrix_state: [B, H, N, N] before the first token; ``None`` is zero.
            lengths: [B] int64, real tokens of each row; ``None`` is T for all.

        Returns:
            [B, T, D] in the dtype of ``h``; [B, H, N, N], float32 at least.
        """
        heads = (*h.shape[:2], self.num_heads, self.head_dim)
        q = torch.tanh(self.q_proj(h)).view(heads)  # [B, T, H, N]
        k = torch.tanh(self.k_proj(h)).view(heads)  # [B, T, H, N]
        v = torch.tanh(self.v_proj(h)).view(heads)  # [B, T, H, N]
        d, rule_weights = None, None
        if self.mixes_rules:
            d = torch.tanh(self.diag_proj(h)).view(heads)  # [B, T, H, N]
            rules = self.rule_proj(h).view(*h.shape[:2], self.num_heads, NUM_RULES)
            rule_weights = rules.softmax(dim=-1)  # [B, T, H, R]
        y, final_state = scan_matrix_state(
            q,
            k,
            v,
            d,
            logsigmoid(self.retention_proj(h)),  # [B, T, H]
            rule_weights,
            initial_state=matrix_state,
            lengths=lengths,
            norm_guard=self.norm_guard,
            backend=self.backend,
        )
        readout = self.out_proj(y.flatten(2))  # [B, T, D]
        return torch.sigmoid(self.residual_gate(h)) * readout, final_state
