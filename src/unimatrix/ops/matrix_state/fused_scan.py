"""Matrix state from a layer's projections: the activations around the scan belong to it.

What a token brings is bound (E24: to unit vectors a head, or through tanh as in the paper), rules
are weighed by a softmax and retention by a sigmoid; with unit vectors the readout is normalised a
head. Done apart, these are some thirty passes over small tensors, forward and backward, and cost
more than the scan. The native back end does them inside it.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize, rms_norm

from unimatrix.errors import InputError
from unimatrix.ops import opaque
from unimatrix.ops.backends import compiles_native
from unimatrix.ops.checks import require_dtype, require_lengths, require_shape
from unimatrix.ops.matrix_state.scan import choose_backend, scan_matrix_state

# Small beside the square of a read-out, which a long retention makes small.
READOUT_EPS = 1e-6


def fuses_scan(backend: str, device: torch.device, num_tokens: int) -> bool:
    """Return whether the scan binds its inputs itself, without delta rule and norm guard."""
    if backend != "auto" or device.type != "cpu":
        return backend == "native" and device.type == "cpu"
    return num_tokens > 1 and compiles_native()


def scan_projected(
    projected: Tensor,
    controls: Tensor,
    *,
    unit: bool,
    delta: bool = False,
    bound: bool = False,
    norm_guard: bool = False,
    initial_state: Tensor | None = None,
    lengths: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Bind a layer's projections, scan the matrix state, and normalise what is read.

    Equation: E1 to E4 and E18 through ``scan_matrix_state``, E24.

    Args:
        projected: [B, T, P, H, N] any float, before any activation: q, k, v and, where rules are
            mixed, d; P is 3 or 4.
        controls: [B, T, C]: the logits of retention [H], then those of the rules [H * 3],
            head-major, where P is 4, or of the write strength [H] with ``delta``.
        unit: q, k, v and d become unit vectors a head and so does the readout times sqrt(N);
            otherwise they pass through tanh. With ``delta`` the payload k stays as it is.
        delta: the delta rule.
        bound: the vectors have passed through tanh.
        norm_guard, initial_state, lengths, backend: as in ``scan_matrix_state``.

    Returns:
        y [B, T, H, N] in the dtype of ``projected``; the state [B, H, N, N], float32 at least.

    Raises:
        InputError: if shapes do not fit, or as ``scan_matrix_state``.

    Cost: as ``scan_matrix_state``; native: one pass over ``projected`` forward, two backward.
    """
    sizes = {"C": controls.shape[-1]}
    require_shape("projected", projected, "B T P H N", sizes)
    require_shape("controls", controls, "B T C", sizes)
    mixed = sizes["P"] == 4
    controls_per_head = 1 + 3 * mixed + delta
    if sizes["P"] not in (3, 4) or sizes["C"] != controls_per_head * sizes["H"]:
        raise InputError(
            f"projected holds {sizes['P']} vectors a head and controls {sizes['C']} numbers; pass "
            f"3 or 4 vectors, and {controls_per_head} numbers for each of {sizes['H']} heads."
        )
    can_fuse = not delta and not norm_guard
    if can_fuse and fuses_scan(backend, projected.device, sizes["T"]):
        dtype = torch.float64 if projected.dtype == torch.float64 else torch.float32
        if initial_state is None:
            shape = (sizes["B"], sizes["H"], sizes["N"], sizes["N"])
            initial_state = projected.new_zeros(shape, dtype=dtype)
        require_shape("initial_state", initial_state, "B H N N", sizes)
        if lengths is not None:
            require_dtype("lengths", lengths, torch.int64)
            require_shape("lengths", lengths, "B", sizes)
            require_lengths(lengths, sizes["T"])
        vectors = projected if unit or bound else torch.tanh(projected)
        tensors = (vectors.to(dtype), controls.to(dtype), initial_state.to(dtype))
        if torch.compiler.is_compiling():
            y, final_state, *_ = opaque.scan_projected(*tensors, lengths, unit)
        else:
            # Imported here: it loads the compiler.
            from unimatrix.ops.matrix_state.fused_scan_native import scan_projected_native

            y, final_state = scan_projected_native(*tensors, lengths, unit=unit)
        return y.to(projected.dtype), final_state
    q, k, v, *rest = projected.unbind(dim=2)  # [B, T, H, N] each
    name = backend
    if backend == "auto":
        name = choose_backend(
            sizes["T"],
            projected.device,
            norm_guard=norm_guard,
            is_delta=delta,
            head_dim=sizes["N"],
            is_double=projected.dtype == torch.float64,
        )

    def bind(vectors: Tensor) -> Tensor:
        if unit:
            bound_vectors = normalize(vectors, dim=-1)
            # Autocast takes norms in float32, which would be twice the bytes for Triton to scan.
            return bound_vectors.to(vectors.dtype) if name == "triton" else bound_vectors
        return vectors if bound else torch.tanh(vectors)

    H = sizes["H"]
    retention, others = controls[..., :H], controls[..., H:].contiguous()
    y, final_state = scan_matrix_state(
        bind(q),
        k if delta else bind(k),
        bind(v),
        bind(rest[0]) if mixed else None,
        logsigmoid(retention),  # [B, T, H]
        others.view(*others.shape[:2], H, 3).softmax(dim=-1) if mixed else None,  # [B, T, H, R]
        write_strength=torch.sigmoid(others) if delta else None,  # [B, T, H]
        initial_state=initial_state,
        lengths=lengths,
        norm_guard=norm_guard,
        backend=name,
    )
    if unit:
        y = rms_norm(y, y.shape[-1:], eps=READOUT_EPS)
    return y, final_state
