"""The size at which a model has as many parameters as another."""

from collections.abc import Callable
from dataclasses import dataclass

NARROWEST_INNER = 4
_WIDEST = 8192

Count = Callable[[int, int], int]


@dataclass(frozen=True)
class Size:
    """What is chosen so that a model has the number of parameters asked for.

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

    The inner width is what is solved for: parameters are affine in it. The width D is the one at
    which the usual ratio of the two comes nearest, so that a model's shape stays near its usual one
    as far as the multiples let it. A target may be out of reach: count what comes back.

    Args:
        count: the parameters at D and F.
        target: parameters wanted.
        ratio: the usual F as a multiple of D.
        multiple: D is a multiple of it.
        inner_multiple: so is F of this.
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
