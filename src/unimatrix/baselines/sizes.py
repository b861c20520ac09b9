"""Sizes of peers: those of a UniMatrix, and those at which parameters are equally many."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from unimatrix.configuration import UniMatrixConfig

NARROWEST_INNER = 4
_WIDEST = 8192

Count = Callable[[int, int], int]


def copy_special_ids(config: UniMatrixConfig) -> dict[str, Any]:
    """Return the ids of PAD, BOS and EOS, under the names of transformers."""
    return {
        name: getattr(config, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")
    }


def copy_sizes(config: UniMatrixConfig) -> dict[str, Any]:
    """Return V, D, L and the special ids, under the names of transformers."""
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers")
    return {name: getattr(config, name) for name in sizes} | copy_special_ids(config)


@dataclass(frozen=True)
class Size:
    """The widths at which a model has the number of parameters that is wanted.

    Attributes:
        hidden_size: D.
        inner_size: F; the width of the state in Mamba-2, which has no feed-forward.
    """

    hidden_size: int
    inner_size: int


def find_size(
    count: Count, target: int, *, ratio: float, multiple: int, inner_multiple: int = 1
) -> Size:
    """Return the size at which a model's parameters are nearest to a number.

    D is chosen first: the multiple at which a model of the usual ratio F / D comes nearest to the
    target, so that its shape stays near the usual one. F is then solved for, since parameters are
    affine in F. A target may be out of reach; the caller counts what comes back.

    Args:
        count: returns the parameters at D and F.
        target: parameters wanted.
        ratio: the usual F / D.
        multiple: D is a multiple of it.
        inner_multiple: F is a multiple of it.
    """
    hidden_size = _find_width(count, target, ratio, multiple)
    one, two = count(hidden_size, NARROWEST_INNER), count(hidden_size, 2 * NARROWEST_INNER)
    per_unit = (two - one) / NARROWEST_INNER
    inner_size = NARROWEST_INNER + (target - one) / per_unit if per_unit else ratio * hidden_size
    return Size(hidden_size, inner_multiple * max(1, round(inner_size / inner_multiple)))


def _find_width(count: Count, target: int, ratio: float, multiple: int) -> int:
    """Return the multiple at which the usual shape is nearest to the target."""

    def count_usual(hidden_size: int) -> int:
        return count(hidden_size, max(NARROWEST_INNER, round(ratio * hidden_size)))

    low, high = 1, max(2, _WIDEST // multiple)
    while low < high:
        middle = (low + high) // 2
        if count_usual(multiple * middle) < target:
            low = middle + 1
        else:
            high = middle
    widths = [multiple * number for number in (low - 1, low) if number >= 1]
    return min(widths, key=lambda width: abs(count_usual(width) - target))
