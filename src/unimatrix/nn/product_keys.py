"""Product keys: the two halves of a key, each replaced by the nearest entry of its codebook."""

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize


class ProductKeys(nn.Module):
    """Quantise keys to one of ``num_codes`` squared, with two small codebooks.

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
