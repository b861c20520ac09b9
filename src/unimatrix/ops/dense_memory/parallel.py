"""The dense associative memory in PyTorch: choose chunk by chunk, then read K entries each."""

import torch
from torch import Tensor

from unimatrix.ops.cosine_read import compute_decision_units, move_to_decisions, read_chosen
from unimatrix.ops.dense_memory.entries import DenseMemory, choose_entries


def read_parallel(
    queries: Tensor, entries: DenseMemory, reads: Tensor, topk: int, chunk_size: int
) -> Tensor:
    """Compute E5 for all tokens at once, on any device.

    Equation: E5.

    Args:
        queries: [B, T, C], float32 or float64.
        entries: P + T entries, the last T written by these tokens.
        reads: [B, T] bool, False on padding.
        topk: K, at most P + T.
        chunk_size: queries scored together.

    Returns:
        context [B, T, Dv].

    Cost:
        O(B T (P + T) C) time; chunk_size x (P + T) scores a row at a time, in float64.
    """
    chosen = _choose(queries, entries, reads, topk, chunk_size).to(queries.device)
    context, _ = read_chosen(queries, entries.keys, entries.values, None, chosen)
    return context


@torch.no_grad()
def _choose(
    queries: Tensor, entries: DenseMemory, reads: Tensor, topk: int, chunk_size: int
) -> Tensor:
    """Return the entries [B, T, K] that each position reads, -1 where there are fewer."""
    query_units = compute_decision_units(queries)
    units = compute_decision_units(entries.keys)
    valid, reads = move_to_decisions(entries.valid), move_to_decisions(reads)
    num_tokens = queries.shape[1]
    num_before = units.shape[1] - num_tokens
    index = torch.arange(units.shape[1], device=units.device)
    chosen = torch.full((*reads.shape, topk), -1, device=units.device)
    for start in range(0, num_tokens, chunk_size):
        stop = min(start + chunk_size, num_tokens)
        seen = num_before + stop  # no query of this chunk sees a later entry
        earlier = index[:seen] < num_before + index[start:stop, None]  # [S, P]
        visible = valid[:, None, :seen] & reads[:, start:stop, None] & earlier  # [B, S, P]
        best = choose_entries(query_units[:, start:stop], units[:, :seen], visible, min(topk, seen))
        chosen[:, start:stop, : best.shape[-1]] = best
    return chosen
