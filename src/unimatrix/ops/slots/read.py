"""Allocate, then read: decisions without gradient, then a differentiable read of K entries."""

from collections.abc import Callable

import torch
from torch import Tensor

from unimatrix.ops.cosine_read import move_to_decisions, take_rows
from unimatrix.ops.slots.decisions import MIN_STRENGTH, Allocation, Undecided
from unimatrix.ops.slots.slot_state import SlotRead, SlotRules, SlotState, SlotTokens

Allocate = Callable[[Undecided, SlotRules], Allocation]
Read = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def scan_by_allocation(
    allocate: Allocate, read: Read, tokens: SlotTokens, slots: SlotState, rules: SlotRules
) -> tuple[SlotRead, SlotState]:
    """Compute E6 to E9: read and write as ``allocate`` decides.

    Returns:
        what each position read, and the slots after the last.

    Cost:
        the scan, plus O(B T K (C + Dv)) for the read; one copy of the M + T entries.
    """
    keys = torch.cat([slots.slot_keys, tokens.keys], dim=1)  # [B, M + T, C]
    values = torch.cat([slots.slot_values, tokens.values], dim=1)  # [B, M + T, Dv]
    strengths = torch.cat([slots.slot_strength, tokens.strengths], dim=1)  # [B, M + T]
    token_ids = torch.cat([slots.slot_token_ids, tokens.token_ids], dim=1)  # [B, M + T]
    with torch.no_grad():
        asked = (tokens.queries, keys, strengths, slots.slot_age, tokens.reads, tokens.writes)
        decided = allocate(Undecided(*map(move_to_decisions, asked)), rules)
        chosen, writers, ages = (field.to(keys.device) for field in decided)
        ids = take_rows(chosen.clamp_min(0), token_ids)[0] * (chosen >= 0)  # [B, T, K]
    log_strength = strengths.clamp_min(MIN_STRENGTH).log()
    context, weights = read(tokens.queries, keys, values, log_strength, chosen)
    held = take_rows(writers, keys, values, strengths, token_ids)
    final = SlotState(
        slot_keys=held[0],
        slot_values=held[1],
        slot_strength=held[2],
        slot_age=ages,
        slot_token_ids=held[3],
    )
    return SlotRead(context, ids, weights), final
