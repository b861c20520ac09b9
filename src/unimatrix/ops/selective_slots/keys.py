"""Contexts as integers: the tokens at chosen distances, hashed into 31 bits."""

from collections.abc import Sequence

import torch
from torch import Tensor

from unimatrix.ops.backends import compiles_native, require_backend
from unimatrix.ops.selective_slots.state import HASH_MASK, HASH_MIX, HASH_STEP, NO_KEY

# For fewer, as in decoding, torch is as fast and needs no compiler.
_FEWEST_IDS = 64


def hash_contexts(
    ids: Tensor, patterns: Sequence[Sequence[int]], *, backend: str = "auto"
) -> Tensor:
    """Hash, for every position and pattern, the tokens at the pattern's distances back.

    Args:
        ids: [B, T] int64, -1 where there is no token.
        patterns: distances back, 0 the position itself, at least one a pattern.
        backend: of the selective slots. With ``native`` a compiled loop hashes ids on the CPU, and
            with ``auto`` those of more than a few tokens. Else tensor operations do.

    Returns:
        [B, T, N] int64 in 0..2^31 - 1; -1 where a token of the context does not exist. A single
        pattern of one token is the token's id, without hashing.

    Raises:
        InputError: if the back end is unknown.

    Note:
        Two contexts share a hash with probability 2^-31. The pattern's number is hashed with it.
    """
    can_loop = ids.device.type == "cpu" and not torch.compiler.is_compiling()
    if backend == "auto":
        is_worth_it = can_loop and ids.numel() > _FEWEST_IDS and compiles_native()
        backend = "native" if is_worth_it else "reference"
    if require_backend("selective_slots", backend) == "native" and can_loop:
        # Imported here: it loads the compiler.
        from unimatrix.ops.selective_slots.native_step import hash_contexts_native

        return hash_contexts_native(ids, patterns)
    return hash_contexts_reference(ids, patterns)


def hash_contexts_reference(ids: Tensor, patterns: Sequence[Sequence[int]]) -> Tensor:
    """Hash contexts with tensor operations, on any device; arguments as in ``hash_contexts``."""
    batch, num_tokens = ids.shape
    keys = []
    for number, pattern in enumerate(patterns):
        hashed = torch.full_like(ids, number + 1)
        exists = torch.ones_like(ids, dtype=torch.bool)
        for distance in pattern:
            back = min(distance, num_tokens)
            missing = ids.new_full((batch, back), NO_KEY)
            token = torch.cat([missing, ids[:, : num_tokens - back]], dim=1)  # [B, T]
            exists &= token >= 0
            hashed = (hashed ^ (token + 1)) * HASH_STEP
            hashed = (hashed ^ ((hashed >> 29) & (2**35 - 1))) * HASH_MIX
        hashed = (hashed ^ ((hashed >> 32) & (2**32 - 1))) & HASH_MASK
        if len(patterns) == 1 and len(pattern) == 1:
            hashed = token
        keys.append(hashed.masked_fill(~exists, NO_KEY))
    return torch.stack(keys, dim=-1)
