"""The normalisation that a configuration names."""

from torch import Tensor, nn

from unimatrix.configuration import UniMatrixConfig
from unimatrix.kernels.passes import normalize_rows


class RowNorm(nn.RMSNorm):
    """Root-mean-square normalisation (E22): torch's own, with a faster pass on the CPU.

    Args:
        width: D.
        eps: added to the mean square.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__(width, eps=eps)
        self.backend = "auto"

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., D] for [..., D]."""
        assert self.eps is not None
        return normalize_rows(x, self.weight, self.eps, backend=self.backend)


def build_norm(config: UniMatrixConfig) -> nn.Module:
    """Return a new norm of the residual stream: ``layer_norm`` or ``rms_norm``."""
    if config.norm_type == "rms_norm":
        return RowNorm(config.hidden_size, eps=config.layer_norm_eps)
    return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
