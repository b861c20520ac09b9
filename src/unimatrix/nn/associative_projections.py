"""Queries, keys, values and the read gate, shared by slots and dense associative memory."""

from torch import nn

from unimatrix.configuration import UniMatrixConfig
from unimatrix.nn.mixer import Mixer


class AssociativeProjections(Mixer):
    """Turn source features into queries, keys and values; gate what was read into the stream.

    Equation: E5 and E6 (inputs), E11 (gate).

    Args:
        config: uses D, C, ``slot_source``, ``identity_lookup`` and ``identity_values``.
    """

    def __init__(self, config: UniMatrixConfig) -> None:
        super().__init__()
        # Token embeddings are the same at every depth step.
        self.reads_at = 0 if config.slot_source == "token" else None
        self.key_size = config.slot_key_size
        self.value_size = config.hidden_size
        width = config.hidden_size
        self.query_proj: nn.Module = nn.Identity()
        self.key_proj: nn.Module = nn.Identity()
        self.value_proj: nn.Module = nn.Identity()
        if not config.identity_lookup:
            self.query_proj = nn.Linear(width, self.key_size, bias=False)
            self.key_proj = nn.Linear(width, self.key_size, bias=False)
        if not config.identity_values:
            self.value_proj = nn.Linear(width, width, bias=False)
        self.read_gate = nn.Linear(width, width)

    @property
    def gate(self) -> nn.Module:
        """The read gate."""
        return self.read_gate
