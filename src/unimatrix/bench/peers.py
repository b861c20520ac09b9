"""The models of other libraries that are timed: how one is built, continued and counted."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from unimatrix.baselines.flash_linear_attention import build_gated_deltanet, build_gla
from unimatrix.baselines.transformers_models import build_llama, build_mamba2, build_rwkv


@dataclass(frozen=True, kw_only=True, slots=True)
class TimedPeer:
    """A model of another library.

    Attributes:
        build: makes it: ``build(config, max_tokens=..., inner_size=...)``.
        cache_name: under which name it takes and returns what it carries from call to call.
        count_mixing: multiply-adds of one token in one layer besides those of its Linear layers,
            whatever came before, from its configuration.
        feeds_forward: whether it has a feed-forward network, whose width ``inner_size`` is.
        inner_ratio: the usual width of that, as a multiple of D.
        attends: whether each earlier token costs 2 D multiply-adds more in every layer.
        needs: a package that it comes from and that runs on a GPU alone; empty is transformers.
    """

    build: Callable[..., Any]
    cache_name: str = "past_key_values"
    count_mixing: Callable[[Any], int]
    feeds_forward: bool = True
    inner_ratio: float = 8 / 3
    attends: bool = False
    needs: str = ""

    @property
    def is_installed(self) -> bool:
        """Whether its package is there."""
        return not self.needs or importlib.util.find_spec(self.needs) is not None

    def explain_absence(self, device: str) -> str | None:
        """Return why the model cannot run here, ``None`` if it can."""
        if not self.needs:
            return None
        if device != "cuda":
            return f"its library runs on a CUDA device only, not on {device}"
        return None if self.is_installed else "flash-linear-attention is not installed"


def count_linear(model: nn.Module, head: nn.Module) -> int:
    """Return the multiply-adds of one token in all Linear layers but the head, each used once."""
    return sum(
        module.weight.numel()
        for module in model.modules()
        if isinstance(module, nn.Linear) and module is not head
    )


def _count_mamba2(config: Any) -> int:
    """Count the convolution, and decay, write and read of a state of N x N in every head."""
    inner = config.num_heads * config.head_dim
    convolved = inner + 2 * config.n_groups * config.state_size
    return int(config.conv_kernel * convolved + 3 * inner * config.state_size)


def _count_rwkv(config: Any) -> int:
    """Count numerator and denominator of each channel: decay, write, and the current token."""
    return int(2 * 3 * config.attention_hidden_size)


def _count_gla(config: Any) -> int:
    """Count decay, write and read of a matrix of keys by values."""
    keys, values = config.expand_k * config.hidden_size, config.expand_v * config.hidden_size
    return int(3 * keys * values / config.num_heads)


def _count_gated_deltanet(config: Any) -> int:
    """Count decay, correction, write and read of a matrix a head, and the convolutions."""
    keys = config.num_heads * config.head_dim
    values = int(config.expand_v * keys)
    return int(4 * keys * values / config.num_heads + config.conv_size * (2 * keys + values))


LLAMA = "llama"
TIMED_PEERS: dict[str, TimedPeer] = {
    LLAMA: TimedPeer(build=build_llama, count_mixing=lambda _: 0, attends=True),
    "mamba2": TimedPeer(
        build=build_mamba2,
        cache_name="cache_params",
        count_mixing=_count_mamba2,
        feeds_forward=False,
    ),
    "rwkv": TimedPeer(
        build=build_rwkv, cache_name="state", count_mixing=_count_rwkv, inner_ratio=4
    ),
    "gla": TimedPeer(build=build_gla, count_mixing=_count_gla, needs="fla"),
    "gated-deltanet": TimedPeer(
        build=build_gated_deltanet, count_mixing=_count_gated_deltanet, needs="fla"
    ),
}
