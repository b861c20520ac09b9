"""Embeddings of token ids, some of which may be none."""

from torch import Tensor, nn

from unimatrix.errors import InputError
from unimatrix.kernels.passes import runs_native
from unimatrix.nn.packed_linear import is_plain


def embed_tokens(
    embed: nn.Embedding, token_ids: Tensor, *, allows_none: bool = False, backend: str = "auto"
) -> Tensor:
    """Return the embedding of each token.

    Args:
        embed: of V tokens in D numbers.
        token_ids: [...] int64.
        allows_none: -1 stands for no token, whose embedding is zero.
        backend: of the fused passes.

    Returns:
        [..., D].

    Raises:
        InputError: for an id that is not in the vocabulary; a GPU ends the process's work instead.
    """
    if _is_pass(embed, token_ids, backend):
        # Imported here: it loads the compiler.
        from unimatrix.kernels.passes.embedding_native import embed_tokens_native

        return embed_tokens_native(token_ids, embed.weight, allows_none=allows_none)
    if not allows_none:
        return _take_rows(embed, token_ids)
    known = (token_ids >= 0).unsqueeze(-1)
    return _take_rows(embed, token_ids.clamp(min=0)) * known


def _take_rows(embed: nn.Embedding, token_ids: Tensor) -> Tensor:
    """Call the embedding; say which id it does not have."""
    try:
        rows: Tensor = embed(token_ids)
    except IndexError as error:  # torch has looked at every id, and names none
        is_strange = (token_ids < 0) | (token_ids >= embed.num_embeddings)
        if not is_strange.any():
            raise
        raise InputError(
            f"token id {int(token_ids[is_strange][0])} is not in the vocabulary; pass 0 to "
            f"{embed.num_embeddings - 1}"
        ) from error
    return rows


def _is_pass(embed: nn.Embedding, token_ids: Tensor, backend: str) -> bool:
    """Return whether it is no more than its rows, and few enough that each thread may sum them."""
    if not is_plain(embed) or embed.padding_idx is not None or embed.max_norm is not None:
        return False
    is_dense = not (embed.sparse or embed.scale_grad_by_freq)
    is_small = embed.num_embeddings <= token_ids.numel()
    return is_dense and is_small and runs_native(backend, embed.weight)
