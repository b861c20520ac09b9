"""The one place where nats become bits."""

import math


def to_bits_per_byte(nats: float, num_bytes: int) -> float:
    """Return the bits per byte of a summed negative log likelihood.

    Args:
        nats: summed over every predicted byte; or the mean, with ``num_bytes=1``.
        num_bytes: bytes predicted, >= 1.
    """
    assert num_bytes >= 1, num_bytes
    return nats / (math.log(2) * num_bytes)
