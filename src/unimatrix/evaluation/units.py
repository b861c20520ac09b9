"""Units: nats as bits per byte, which are computed nowhere else, and bytes for people."""

import math


def to_bits_per_byte(nats: float, num_bytes: int) -> float:
    """Return the bits per byte of a summed negative log likelihood.

    Args:
        nats: summed over every predicted byte; or the mean, with ``num_bytes=1``.
        num_bytes: bytes predicted, >= 1.
    """
    assert num_bytes >= 1, num_bytes
    return nats / (math.log(2) * num_bytes)


def format_bytes(value: float) -> str:
    """Return bytes in the largest unit that keeps the number at 1 or more."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f} B"
