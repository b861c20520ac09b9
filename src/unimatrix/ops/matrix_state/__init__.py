"""Matrix state: [N, N] a head that retains, is written by a rule, and is read (E1 to E4)."""

from unimatrix.ops.matrix_state.fused_scan import READOUT_EPS, scan_projected
from unimatrix.ops.matrix_state.scan import choose_backend, scan_matrix_state

__all__ = ["READOUT_EPS", "choose_backend", "scan_matrix_state", "scan_projected"]
