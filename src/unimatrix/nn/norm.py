"""The normalisation that a configuration names."""

from torch import nn

from unimatrix.configuration import UniMatrixConfig


def build_norm(config: UniMatrixConfig) -> nn.Module:
    """Return a new norm of the residual stream: ``layer_norm`` or ``rms_norm``."""
    if config.norm_type == "rms_norm":
        return nn.RMSNorm(config.hidden_size, eps=config.layer_norm_eps)
    return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
