"""Slot decisions as a loop over tokens of whole-batch tensor operations, on any device."""

import torch

from unimatrix.ops.cosine_read import compute_decision_units, take_rows
from unimatrix.ops.slots.decisions import (
    Allocation,
    DecisionEntries,
    Undecided,
    advance_ages,
    choose_slot,
    prepare_entries,
    rank_slots,
)
from unimatrix.ops.slots.slot_state import SlotRules


def allocate_parallel(tokens: Undecided, rules: SlotRules) -> Allocation:
    """Decide for every token which entries it reads and which slot it writes.

    Equation: E6 (order), E7.

    Cost:
        T rounds of O(B M C) operations; nothing larger than [B, M, C].
    """
    queries, keys, strengths, initial_ages, reads, writes = tokens
    batch, num_slots = initial_ages.shape
    query_units = compute_decision_units(queries)  # [B, T, C]
    entries = prepare_entries(keys, strengths, rules.strength_floor)
    index = torch.arange(num_slots, device=initial_ages.device)  # [M]
    writers = index.expand(batch, num_slots)
    ages = initial_ages
    chosen = []
    for t in range(query_units.shape[1]):
        slots = DecisionEntries(*take_rows(writers, *entries))
        order = rank_slots(query_units[:, t], slots, rules.slots_per_read)  # [B, K]
        order = order.masked_fill(~reads[:, t, None], -1)
        chosen.append(writers.gather(1, order.clamp_min(0)).masked_fill(order < 0, -1))
        key_units = entries.units[:, num_slots + t]  # [B, C]
        slot = choose_slot(key_units, slots, ages, rules.match_threshold)  # [B]
        written = (index == slot.unsqueeze(1)) & writes[:, t, None]  # [B, M]
        ages = advance_ages(ages, slots.filled, written)
        writers = writers.masked_fill(written, num_slots + t)
    return Allocation(torch.stack(chosen, dim=1), writers, ages)
