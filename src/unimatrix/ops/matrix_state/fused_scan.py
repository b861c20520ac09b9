"""Matrix state from a layer's projections: the activations around the scan run inside it.

What a token brings is bound (E24: to unit vectors a head, or through tanh as in the paper), rules
are weighed by a softmax and retention by a sigmoid; with unit vectors the readout is normalised a
head. As separate operators these are some thirty passes over small tensors, forward and backward,
and cost more than the scan.
"""

import torch
from torch import Tensor

from unimatrix.errors import InputError
from unimatrix.ops.backends import compiles_native
from unimatrix.ops.checks import require_dtype, require_lengths, require_shape


def fuses_scan(backend: str, device: torch.device, num_tokens: int) -> bool:
    """Return whether ``bind_and_scan`` is what a back end means, if the rules allow it."""
    if backend != "auto" or device.type != "cpu":
        return backend == "native" and device.type == "cpu"
    return num_tokens > 1 and compiles_native()


def bind_and_scan(
    vectors: Tensor,
    controls: Tensor,
    *,
    unit: bool,
    bound: bool = False,
    initial_state: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Bind a layer's projections, scan the matrix state, and normalise what is read, on the CPU.

    Equation: E1, E2, E4, E24; see ``MatrixMixer.scan`` for the same in tensor operations.

    Args:
        vectors: [B, T, P, H, N] any float, before any activation: q, k, v and, where rules are
            mixed, d; P is 3 or 4.
        controls: [B, T, C]: the logits of retention [H], then where P is 4 those of the rules
            [H * 3], head-major.
        unit: q, k, v and d become unit vectors a head and so does the readout times sqrt(N);
            otherwise they pass through tanh.
        bound: the vectors have passed through tanh.
        initial_state, lengths: as in ``scan_matrix_state``.

    Returns:
        y [B, T, H, N] in the dtype of ``vectors``; the state [B, H, N, N], float32 at least.

    Raises:
        InputError: if shapes do not fit, or lengths leave 0..T.

    Cost: as ``scan_matrix_state``, native: one pass over ``vectors`` forward, two backward.
    """
    # Imported here: it loads the compiler.
    from unimatrix.ops.matrix_state.fused_scan_native import bind_and_scan_native

    sizes = {"C": controls.shape[-1]}
    require_shape("vectors", vectors, "B T P H N", sizes)
    require_shape("controls", controls, "B T C", sizes)
    is_mixed = sizes["P"] == 4
    controls_per_head = 4 if is_mixed else 1
    if sizes["P"] not in (3, 4) or sizes["C"] != controls_per_head * sizes["H"]:
        raise InputError(
            f"vectors holds {sizes['P']} vectors a head and controls {sizes['C']} numbers; pass "
            f"3 or 4 vectors, and {controls_per_head} numbers for each of {sizes['H']} heads."
        )
    dtype = torch.float64 if vectors.dtype == torch.float64 else torch.float32
    if initial_state is None:
        shape = (sizes["B"], sizes["H"], sizes["N"], sizes["N"])
        initial_state = vectors.new_zeros(shape, dtype=dtype)
    require_shape("initial_state", initial_state, "B H N N", sizes)
    if lengths is not None:
        require_dtype("lengths", lengths, torch.int64)
        require_shape("lengths", lengths, "B", sizes)
        require_lengths(lengths, sizes["T"])
    activated = vectors if unit or bound else torch.tanh(vectors)
    tensors = (activated.to(dtype), controls.to(dtype), initial_state.to(dtype))
    y, final_state = bind_and_scan_native(*tensors, lengths, is_mixed, unit)
    return y.to(vectors.dtype), final_state
