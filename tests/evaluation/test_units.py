import math

import pytest

from unimatrix.evaluation.units import to_bits_per_byte


def test_uniform_over_256_bytes_is_8_bits() -> None:
    assert to_bits_per_byte(10 * math.log(256), 10) == pytest.approx(8, abs=1e-12)


def test_mean_nats() -> None:
    assert to_bits_per_byte(math.log(2), 1) == pytest.approx(1, abs=1e-12)
