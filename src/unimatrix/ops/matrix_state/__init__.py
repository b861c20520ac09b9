"""Matrix state: [N, N] a head that retains, is written by a rule, and is read (E1 to E4)."""

from unimatrix.ops.matrix_state.fused_scan import bind_and_scan
from unimatrix.ops.matrix_state.reference import READOUT_EPS
from unimatrix.ops.matrix_state.scan import choose_backend, scan_matrix_state

__all__ = ["READOUT_EPS", "bind_and_scan", "choose_backend", "scan_matrix_state"]
