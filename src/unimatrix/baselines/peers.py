"""Every peer by its name in a comparison."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from transformers import PreTrainedModel

from unimatrix.baselines.gated_linear_attention import (
    build_gated_deltanet,
    build_gated_linear_attention,
)
from unimatrix.baselines.transformers_models import (
    build_gelu_transformer,
    build_llama,
    build_mamba2,
    build_rwkv,
    build_universal_transformer,
)
from unimatrix.configuration import UniMatrixConfig


class BuildPeer(Protocol):
    """Build a peer with the width, depth, heads and special tokens of a UniMatrix."""

    def __call__(
        self, config: UniMatrixConfig, *, max_tokens: int, inner_size: int | None = None
    ) -> PreTrainedModel:
        """Return the model with fresh weights.

        Args:
            config: uses V, D, L, the special tokens, and H, N and dropout where the peer has them.
            max_tokens: the longest sequence, for a peer with positions.
            inner_size: F, the width of the feed-forward; ``None`` is the peer's usual one.
        """


@dataclass(frozen=True)
class Peer:
    """A model from elsewhere."""

    build: BuildPeer
    """Builds it."""
    inner_ratio: float
    """Its usual inner width, as a multiple of D."""
    width_multiple: int
    """D is a multiple of this times H."""


PEERS: Mapping[str, Peer] = {
    "llama": Peer(build_llama, 8 / 3, 2),
    "gelu-transformer": Peer(build_gelu_transformer, 4, 1),
    "universal-transformer": Peer(build_universal_transformer, 8 / 3, 2),
    "mamba2": Peer(build_mamba2, 1 / 2, 2),
    "rwkv": Peer(build_rwkv, 4, 1),
    "gated-linear-attention": Peer(build_gated_linear_attention, 8 / 3, 2),
    "gated-deltanet": Peer(build_gated_deltanet, 8 / 3, 4),
}
