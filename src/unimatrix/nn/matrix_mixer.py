"""Projections around the matrix state."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, normalize, rms_norm

from unimatrix.configuration import UniMatrixConfig
from unimatrix.nn.mixer import Mixer, Read, StateTensor, Tokens
from unimatrix.nn.short_convolution import ShortConvolution
from unimatrix.ops.matrix_state import READOUT_EPS, scan_matrix_state

NUM_RULES = 3


class MatrixState(NamedTuple):
    """What the matrix mixer carries from call to call, at each depth step.

    Attributes:
        matrix_state: [B, H, N, N], payload by address, float32 at least.
        recent: [B, K - 1, D], normalised streams of the last tokens, with a short convolution over
            K tokens.
    """

    matrix_state: Tensor
    recent: Tensor | None = None


def _normalize(vectors: Tensor) -> Tensor:
    """Return unit vectors [..., N] in their own dtype: autocast takes norms in float32."""
    return normalize(vectors, dim=-1).to(vectors.dtype)


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


class MatrixMixer(Mixer):
    """Mix tokens through one matrix state per head.

    Equation: E1 to E4, E18, E19, E24.
    Source: paper, section on the hybrid state update; ``docs/deviations.md`` D1 and D7.

    Args:
        config: uses D, H, N, ``update_rules``, ``conv_kernel``, ``norm_guard``, ``normalized_keys``
            and ``longest_retention``.
    """

    name, operator, part = "matrix_mixer", "matrix_state", "matrix_state"
    State, state_prefix, chosen_by = MatrixState, "", "update_rules"

    def __init__(self, config: UniMatrixConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.head_dim = config.head_dim
        self.norm_guard = config.norm_guard
        self.normalized_keys = config.normalized_keys
        self.update_rules = config.update_rules
        self.mixes_rules = config.update_rules == "mixed"
        self.uses_delta = config.update_rules == "delta"
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

    @classmethod
    def list_state_fields(cls, config: UniMatrixConfig) -> tuple[str, ...]:
        """See ``Mixer.list_state_fields``."""
        return ("num_attention_heads", "head_dim", "update_rules", "conv_kernel", "norm_guard")

    @classmethod
    def list_state_tensors(cls, config: UniMatrixConfig) -> dict[str, StateTensor]:
        """See ``Mixer.list_state_tensors``."""
        N = config.head_dim
        recent = StateTensor((max(config.conv_kernel - 1, 0), config.hidden_size))
        matrices = StateTensor((config.num_attention_heads, N, N))
        return {"matrix_state": matrices, "recent": recent}

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

    @property
    def gate(self) -> nn.Module:
        """The residual gate."""
        return self.residual_gate

    def forward(
        self, source: Tensor, tokens: Tokens, state: MatrixState | None
    ) -> tuple[Read, MatrixState]:
        """Write each token into every head's matrix state, then read; see ``Mixer.forward``."""
        matrix_state, recent = (None, None) if state is None else state
        mixed = source
        if self.short_conv is not None:
            mixed, recent = self.short_conv(source, recent, tokens.lengths)
        vectors = torch.cat([layer(mixed) for layer in self.vector_layers], dim=-1)
        controls = torch.cat([layer(source) for layer in self.control_layers], dim=-1)
        readout, matrix_state = self.scan(vectors, controls, matrix_state, tokens.lengths)
        return Read(self.out_proj(readout)), MatrixState(matrix_state, recent)

    def scan(
        self,
        vectors: Tensor,
        controls: Tensor,
        matrix_state: Tensor | None,
        lengths: Tensor | None,
        *,
        is_bound: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Return the readout before ``out_proj`` and the state after the last real token.

        Args:
            vectors: [B, T, P H N], of ``vector_layers`` side by side.
            controls: [B, T, C], of ``control_layers`` side by side.
            matrix_state: [B, H, N, N] before the first token; ``None`` is zero.
            lengths: [B] int64, real tokens of each row; ``None`` is T for all.
            is_bound: whether the vectors have passed through tanh, where ``squashes``.

        Returns:
            [B, T, H N] in the dtype of the vectors; [B, H, N, N], float32 at least.
        """
        # q asks, k is the payload, v the address, d what the diagonal rule writes.
        H = self.num_heads
        q, k, v, *d = vectors.view(*vectors.shape[:2], -1, H, self.head_dim).unbind(dim=2)
        retention, others = controls[..., :H], controls[..., H:].contiguous()
        bind: Callable[[Tensor], Tensor] = nn.Identity()
        if not is_bound:  # E24
            bind = _normalize if self.normalized_keys else torch.tanh
        readout, matrix_state = scan_matrix_state(  # E1 to E4, E18
            bind(q),
            k if self.uses_delta else bind(k),
            bind(v),
            bind(d[0]) if self.mixes_rules else None,
            logsigmoid(retention),  # [B, T, H]
            others.view(*others.shape[:2], H, -1).softmax(dim=-1) if self.mixes_rules else None,
            write_strength=torch.sigmoid(others) if self.uses_delta else None,  # [B, T, H]
            initial_state=matrix_state,
            lengths=lengths,
            norm_guard=self.norm_guard,
            **self.operator_options,
        )
        if self.normalized_keys:
            readout = rms_norm(readout, readout.shape[-1:], eps=READOUT_EPS)
        return readout.flatten(2), matrix_state
