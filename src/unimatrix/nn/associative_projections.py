"""Queries, keys, values and the read gate, shared by slots and dense associative memory."""

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from unimatrix.configuration import UniMatrixConfig
from unimatrix.nn.mixer import Mixer, StateTensor


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

    @classmethod
    def list_state_fields(cls, config: UniMatrixConfig) -> tuple[str, ...]:
        """See ``Mixer.list_state_fields``."""
        of_lookup = ("slot_source", "slot_key_size", "identity_lookup", "identity_values")
        return ("associative_memory", *of_lookup)

    @classmethod
    def list_state_tensors(cls, config: UniMatrixConfig) -> dict[str, StateTensor]:
        """See ``Mixer.list_state_tensors``."""
        return {"previous": StateTensor((config.hidden_size,))}

    @property
    def gate(self) -> nn.Module:
        """The read gate."""
        return self.read_gate


class ProductKeys(nn.Module):
    """Replace each half of a key by the nearest entry of its codebook, of ``num_codes`` entries.

    Equation: E20.
    Source: Lample et al., "Large Memory Layers with Product Keys" (arXiv:1907.05242), where the
    keys of a fixed table are products; here the keys of what is written are.

    Args:
        key_size: C, even.
        num_codes: entries of each codebook.
    """

    def __init__(self, key_size: int, num_codes: int) -> None:
        super().__init__()
        # Embeddings, so that they start like every other table.
        self.codebooks = nn.ModuleList(nn.Embedding(num_codes, key_size // 2) for _ in range(2))

    def forward(self, keys: Tensor) -> Tensor:
        """Return the nearest product keys by cosine, [B, T, C] for keys [B, T, C].

        Halves are unit vectors. The gradient is that of the softmax over a codebook's entries, to
        the keys and to the codebooks.
        """
        halves = []
        for half, codebook in zip(keys.chunk(2, dim=-1), self.codebooks, strict=True):
            codes = normalize(codebook.weight, dim=-1)  # type: ignore[arg-type]
            scores = normalize(half, dim=-1) @ codes.mT  # [B, T, num_codes]
            nearest = codes[scores.argmax(dim=-1)]  # [B, T, C / 2]
            soft = scores.softmax(dim=-1) @ codes
            halves.append(nearest.detach() + (soft - soft.detach()))
        return torch.cat(halves, dim=-1)
