"""The normalisation that a configuration names."""

from torch import nn

from unimatrix.configuration import UniMatrixConfig


def build_norm(config: UniMatrixConfig) -> nn.LayerNorm | nn.RMSNorm:
    """Return a new norm of the residual stream (E22): ``layer_norm`` or ``rms_norm``."""
    kind = nn.RMSNorm if config.norm_type == "rms_norm" else nn.LayerNorm
    return kind(config.hidden_size, eps=config.layer_norm_eps)
