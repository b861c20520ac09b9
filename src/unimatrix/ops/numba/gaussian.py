"""The standard normal distribution of lanes of numbers, of which GELU is made."""
# mypy: allow-untyped-defs

import math

from unimatrix.ops.numba.compile import part
from unimatrix.ops.numba.lanes import OPTIONS, exponential, minus, over, plus, times, where_negative

# ln(erfc(z) / t) + z^2 with t = 2 / (2 + z), as a polynomial in 2 t - 1: a Chebyshev fit to the
# last bits of float32 and of float64.
_TAIL_32 = (
    -0.6717940760543342, 0.6726422171554879, 0.047343106290901014, -0.04687488817886134,
    -0.009873768747331393, 0.008703812035218805, 0.0017765646350106873, -0.002048734760496573,
    -0.00020790912059481928, 0.00033373589390861395,
)  # fmt: skip
_TAIL_64 = (
    -0.6717940840566923, 0.6726432239776567, 0.04734330684190443, -0.0468956102311753,
    -0.009872689366389959, 0.008824938557060623, 0.001758933557799016, -0.002345812500482853,
    -0.00014624686337800336, 0.000673678795580235, -9.37350311709817e-05, -0.0001743029472030762,
    7.14010141275703e-05, 3.17451797494374e-05, -3.0187884551394243e-05, 1.3772664134464417e-07,
    8.562623420121286e-06, -2.947986876998259e-06, -1.27231190486887e-06, 1.2500276612569754e-06,
    -1.6849800720653297e-07, -2.495832761719667e-07, 1.5334345920908177e-07, 1.444865804625267e-09,
    -3.9171820510271855e-08, 1.1172352263623759e-08, 4.06088214696972e-09, -1.8902306008944537e-09,
)  # fmt: skip

_DENSITY_AT_0 = 1 / math.sqrt(2 * math.pi)


@part(**OPTIONS)
def integrate_normal(double, x):
    """Return the distribution's integral up to each lane; ``double`` is empty for float32."""
    nothing = minus(x, x)
    z = times(where_negative(x, times(x, -1.0), x), math.sqrt(0.5))
    share = over(plus(nothing, 2.0), plus(z, 2.0))
    place, power = plus(times(share, 2.0), -1.0), nothing
    if len(double):
        for n in range(len(_TAIL_64) - 1, -1, -1):
            power = plus(times(power, place), _TAIL_64[n])
    else:
        for n in range(len(_TAIL_32) - 1, -1, -1):
            power = plus(times(power, place), _TAIL_32[n])
    tail = times(times(share, exponential(minus(power, times(z, z)))), 0.5)
    return where_negative(x, tail, minus(plus(nothing, 1.0), tail))


@part(**OPTIONS)
def find_normal_density(x):
    """Return the distribution's density at each lane."""
    return times(exponential(times(times(x, x), -0.5)), _DENSITY_AT_0)
