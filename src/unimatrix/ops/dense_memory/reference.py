"""The dense associative memory as the loop of the equation, over all entries at each token."""

import math

import torch
from torch import Tensor

from unimatrix.ops.cosine_read import LOGIT_SCALE, compute_decision_units, normalise
from unimatrix.ops.dense_memory.entries import DenseMemory, choose_entries


def read_reference(queries: Tensor, entries: DenseMemory, reads: Tensor, topk: int) -> Tensor:
    """Compute E5 token by token: softmax(8 cos(query, key) / sqrt(C)) over the best K entries.

    Equation: E5.
    Source: paper, section on Assoc; published code ``model/unimatrix.py``.

    Args:
        queries: [B, T, C], float32 or float64.
        entries: P + T entries, the last T written by these tokens.
        reads: [B, T] bool, False on padding.
        topk: K, at most P + T.

    Returns:
        context [B, T, Dv].
    """
    num_tokens, num_entries = queries.shape[1], entries.keys.shape[1]
    units = compute_decision_units(entries.keys)
    contexts = []
    for t in range(num_tokens):
        query = queries[:, t]  # [B, C]
        visible = entries.valid & reads[:, t, None]  # [B, P + T]
        visible[:, num_entries - num_tokens + t :] = False
        query_units = compute_decision_units(query).unsqueeze(1)
        chosen = choose_entries(query_units, units, visible.unsqueeze(1), topk).squeeze(1)
        exists, rows = chosen >= 0, chosen.clamp_min(0)  # [B, K]
        cosine = torch.einsum("bpc,bc->bp", normalise(entries.keys), normalise(query))
        logits = LOGIT_SCALE * cosine.gather(1, rows) / math.sqrt(query.shape[-1])
        weights = logits.masked_fill(~exists, torch.finfo(logits.dtype).min).softmax(-1) * exists
        spread = torch.zeros_like(cosine).scatter_add(1, rows, weights)  # [B, P + T]
        contexts.append(torch.einsum("bp,bpd->bd", spread, entries.values))
    return torch.stack(contexts, dim=1)
