"""The slots as the loop of the equation: at each token read, then write, over all M slots.

The letters: a token brings ``queries``, ``keys``, ``values``, ``strengths``; a slot holds
``slot_keys``, ``slot_values``, ``slot_strength``, ``slot_age``, ``slot_token_ids``.
"""

import math

import torch
from torch import Tensor

from unimatrix.ops.cosine_read import LOGIT_SCALE, compute_decision_units, normalise
from unimatrix.ops.slots.decisions import (
    MIN_STRENGTH,
    advance_ages,
    choose_slot,
    prepare_entries,
    rank_slots,
)
from unimatrix.ops.slots.slot_state import SlotRead, SlotRules, SlotState, SlotTokens


def scan_slots_reference(
    tokens: SlotTokens, slots: SlotState, rules: SlotRules
) -> tuple[SlotRead, SlotState]:
    """Read, then write, token by token.

    Equation: E6 to E9.
    Source: paper, section on SparsePointer; published code ``model/unimatrix.py``.

    Returns:
        what each position read, and the slots after the last.
    """
    reads = []
    for t in range(tokens.queries.shape[1]):
        token = SlotTokens(*(field[:, t] for field in tokens))
        reads.append(_read(token, slots, rules))
        slots = _write(token, slots, rules)
    context, ids, weights = (torch.stack(parts, dim=1) for parts in zip(*reads, strict=True))
    return SlotRead(context, ids, weights), slots


def _score(query: Tensor, slots: SlotState) -> Tensor:
    """Compute E6, cos(query, key_m) / sqrt(C) + ln(max(strength_m, 1e-4)) [B, M], E8 in it."""
    cosine = torch.einsum("bmc,bc->bm", normalise(slots.slot_keys), normalise(query))
    return cosine / math.sqrt(query.shape[-1]) + slots.slot_strength.clamp_min(MIN_STRENGTH).log()


def _read(token: SlotTokens, slots: SlotState, rules: SlotRules) -> SlotRead:
    """Compute E9: softmax(8 score) over the K best filled slots, and what they hold."""
    entries = prepare_entries(slots.slot_keys, slots.slot_strength, rules.strength_floor)
    order = rank_slots(compute_decision_units(token.queries), entries, rules.slots_per_read)
    order = order.masked_fill(~token.reads.unsqueeze(-1), -1)  # [B, K]
    exists = order >= 0
    rows = order.clamp_min(0)
    logits = LOGIT_SCALE * _score(token.queries, slots).gather(1, rows)  # [B, K]
    weights = logits.masked_fill(~exists, torch.finfo(logits.dtype).min).softmax(-1) * exists
    dense = torch.zeros_like(slots.slot_strength).scatter_add(1, rows, weights)  # [B, M]
    context = torch.einsum("bm,bmd->bd", dense, slots.slot_values)
    ids = slots.slot_token_ids.gather(1, rows) * exists
    return SlotRead(context, ids, weights)


def _write(token: SlotTokens, slots: SlotState, rules: SlotRules) -> SlotState:
    """Compute E7: overwrite the match, else the first unfilled slot, else the oldest."""
    entries = prepare_entries(slots.slot_keys, slots.slot_strength, rules.strength_floor)
    units = compute_decision_units(token.keys)
    slot = choose_slot(units, entries, slots.slot_age, rules.match_threshold)  # [B]
    index = torch.arange(slots.slot_age.shape[1], device=slot.device)
    written = (index == slot.unsqueeze(1)) & token.writes.unsqueeze(1)  # [B, M]
    wide = written.unsqueeze(-1)
    return SlotState(
        torch.where(wide, token.keys.unsqueeze(1), slots.slot_keys),
        torch.where(wide, token.values.unsqueeze(1), slots.slot_values),
        torch.where(written, token.strengths.unsqueeze(1), slots.slot_strength),
        advance_ages(slots.slot_age, entries.filled, written),
        torch.where(written, token.token_ids.unsqueeze(1), slots.slot_token_ids),
    )
