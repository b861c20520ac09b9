"""Contexts, gate, read and pointer around the selective slots."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, logsigmoid, rms_norm

from unimatrix.configuration import UniMatrixConfig
from unimatrix.nn.mixer import Mixer, StateTensor, Tokens
from unimatrix.ops.checks import find_real_tokens
from unimatrix.ops.hindsight import HindsightRules, HindsightScale, watch_reads
from unimatrix.ops.selective_slots import (
    CODES_PER_NAT,
    NO_KEY,
    SelectiveSlots,
    SlotLookup,
    SlotScan,
    empty_selective_slots,
    encode_strengths,
    hash_contexts,
    scan_selective_slots,
)

_FIRST_READ_SCORE = 4.0


class SelectiveState(NamedTuple):
    """What the selective slots carry from call to call.

    Attributes:
        slots: the M slots.
        recent_token_ids: [B, n] int32, the last tokens, as far back as contexts reach; -1 for none.
        logits: [B, M], the gate's logits behind the codes, kept only while gradients are recorded,
            so that they pass from call to call.
    """

    slots: SelectiveSlots
    recent_token_ids: Tensor
    logits: Tensor | None = None


class SelectiveRead(NamedTuple):
    """What every position found, and what the pointer and the loss need of it.

    Attributes:
        context: [B, T, D], weighted values, projected.
        token_ids: [B, T, Q] int64, the values; 0 where nothing was found.
        log_strength: [B, T, Q], ln of the strength they are held with; -inf for nothing.
        probe: [B, T, Q] zeros to add to the pointer's log weights (``ops.hindsight``).
        scale: to be added to the loss; both are ``None`` where nothing is learned in hindsight.
    """

    context: Tensor
    token_ids: Tensor
    log_strength: Tensor
    probe: Tensor | None
    scale: HindsightScale | None


class Found(NamedTuple):
    """What looking contexts up has found, before it is weighed.

    Attributes:
        lookup: entries, codes and values found, [B, T, Q] each.
        held_logits: [B, M], the gate's logits behind the slots at the start.
        logits: [B, T, N], the gate's logits of these tokens' writes.
        offered: [B, T, N] bool, the writes that exist.
    """

    lookup: SlotLookup
    held_logits: Tensor
    logits: Tensor
    offered: Tensor

    @property
    def entries(self) -> Tensor:
        """The logits of slots and writes by the lookup's entry, [B, M + T N]."""
        return torch.cat([self.held_logits, self.logits.flatten(1)], dim=1)


def normalize_features(vectors: Tensor) -> Tensor:
    """Return vectors [..., D] over their root mean square."""
    return rms_norm(vectors, vectors.shape[-1:], None, torch.finfo(vectors.dtype).eps)


def _count_recent(config: UniMatrixConfig) -> int:
    """Return how many tokens before the current one contexts reach."""
    farthest = max(max(pattern) for pattern in config.slot_key_patterns)
    # A write's context ends one token back, a read's as many as its offset.
    return farthest + max(1, *config.slot_read_offsets)


class SelectiveMixer(Mixer):
    """Look the recent contexts up, and offer the one before to the slots.

    Equation: E13 to E16, E21.
    Source: this project.

    Args:
        config: uses D, V, M, the ``slot_*`` fields and the ``hindsight*`` fields.
    """

    name, operator, part = "selective_mixer", "selective_slots", "slots"
    State, state_prefix = SelectiveState, "associations.selective."

    def __init__(self, config: UniMatrixConfig) -> None:
        super().__init__()
        self.reads_ids = True
        # A gate that sees the stream looks after the first depth step.
        self.reads_at = int(config.slot_source == "hidden")
        self.patterns = [list(pattern) for pattern in config.slot_key_patterns]
        self.read_offsets = list(config.slot_read_offsets)
        self.num_slots = config.num_slots
        self.bounded_training = config.bounded_training
        self.vocab_size = config.vocab_size
        self.margin = round(config.slot_margin * CODES_PER_NAT)
        self.keep_first = config.repeated_key == "first"
        self.fade_tokens = config.slot_fade_tokens
        self.rules = None
        if config.hindsight != "none":
            self.rules = HindsightRules(
                config.hindsight,
                config.hindsight_share,
                config.hindsight_floor,
                config.hindsight_weight,
            )
        self.num_recent = _count_recent(config)
        width, num_patterns = config.hidden_size, len(self.patterns)
        self.num_hops = config.slot_hops
        self.num_reads = num_patterns * len(self.read_offsets) * self.num_hops
        self.gate_up = nn.Linear((2 + self.reads_at) * width, width // 2)
        self.gate_down = nn.Linear(width // 2, num_patterns)
        self.read_score = nn.Parameter(torch.empty(self.num_reads))
        self.value_proj = nn.Linear(width, width, bias=False)
        self.read_gate = nn.Linear(width, width)

    @classmethod
    def list_state_fields(cls, config: UniMatrixConfig) -> tuple[str, ...]:
        """See ``Mixer.list_state_fields``."""
        of_contexts = ("slot_key_patterns", "slot_read_offsets", "repeated_key")
        of_slots = ("associative_memory", "num_slots", "slot_margin", "slot_fade_tokens")
        return (*of_contexts, *of_slots)

    @classmethod
    def list_state_tensors(cls, config: UniMatrixConfig) -> dict[str, StateTensor]:
        """See ``Mixer.list_state_tensors``."""
        M = config.num_slots
        return {
            "slots.slot_keys": StateTensor((M,), "whole"),
            "slots.slot_value_ids": StateTensor((M,), "whole", is_ids=True),
            "slots.slot_codes": StateTensor((M,), "whole"),
            "recent_token_ids": StateTensor((_count_recent(config),), "whole", is_ids=True),
            "logits": StateTensor((M,)),
        }

    def list_starts(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Return the parameters that start elsewhere: a read is clearly above reading nothing."""
        return [(self.read_score, torch.full((self.num_reads,), _FIRST_READ_SCORE))]

    @property
    def gate(self) -> nn.Module:
        """The read gate."""
        return self.read_gate

    def forward(
        self, source: Tensor, tokens: Tokens, state: SelectiveState | None
    ) -> tuple[SelectiveRead, SelectiveState | None]:
        """Look up, write and read at every position; see ``Mixer.forward``.

        Training looks up in slots without a bound, unless ``bounded_training``.
        """
        stream = self.join_stream(tokens.ids, state)
        logits = self.weigh_writes(source, tokens, stream)
        found, state = self.look_up(tokens, stream, logits, state)
        log_strength, weights, probe, scale = self.weigh_reads(found)
        values = normalize_features(tokens.embed(found.lookup.value_ids))  # [B, T, Q, D]
        mixed = (weights.unsqueeze(-1) * values).sum(dim=2).to(values.dtype)
        context = self.value_proj(mixed)
        read = SelectiveRead(context, found.lookup.value_ids, log_strength, probe, scale)
        return read, state

    def join_stream(self, ids: Tensor, state: SelectiveState | None) -> Tensor:
        """Return the tokens with those before that contexts reach, [B, n + T], -1 for none."""
        if state is None:
            recent = ids.new_full((ids.shape[0], self.num_recent), -1)
        else:
            recent = state.recent_token_ids.long()
        return torch.cat([recent, ids], dim=1)

    def weigh_writes(self, source: Tensor, tokens: Tokens, stream: Tensor) -> Tensor:
        """Return the logit of each write's strength, [B, T, N]; arguments as in ``look_up``."""
        pair = stream[:, self.num_recent - 1 :]  # [B, 1 + T], -1 before the first token
        features = tokens.embed(pair.clamp_min(0)) * (pair >= 0).unsqueeze(-1)
        features = normalize_features(features)
        inputs = [features[:, :-1], features[:, 1:]]
        if self.reads_at:
            inputs.append(normalize_features(source))
        logits: Tensor = self.gate_down(gelu(self.gate_up(torch.cat(inputs, dim=-1))))
        # Strengths are carried and compared: no fewer digits than the state has.
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def look_up(
        self, tokens: Tokens, stream: Tensor, logits: Tensor, state: SelectiveState | None
    ) -> tuple[Found, SelectiveState | None]:
        """Run the slots over the tokens.

        Args:
            tokens: these tokens.
            stream: [B, n + T], from ``join_stream``.
            logits: [B, T, N], from ``weigh_writes``.
            state: slots and recent tokens before; ``None`` is an empty stream.

        Returns:
            what each position found, and the state after the last real token, if it is kept.
        """
        batch, ids = tokens.ids.shape[0], tokens.ids
        slots = None if state is None else state.slots
        if slots is None:
            slots = empty_selective_slots(batch, self.num_slots, self.vocab_size, device=ids.device)
        keys = hash_contexts(stream, self.patterns, **self.operator_options)  # [B, n + T, N]
        write_keys = self._ending(keys, 1)
        scan = partial(
            scan_selective_slots,
            write_keys=write_keys,
            value_ids=ids,
            codes=encode_strengths(logits),
            initial=slots,
            margin=self.margin,
            keep_first=self.keep_first,
            fade_tokens=self.fade_tokens,
            first_position=tokens.num_before,
            lengths=tokens.lengths,
            **self.operator_options,
        )
        read_keys = torch.cat([self._ending(keys, offset) for offset in self.read_offsets], dim=-1)
        bounded = self.bounded_training or not self.training
        lookup, scanned = self._follow(read_keys, partial(scan, bounded=bounded))
        held_logits = None if state is None else state.logits
        if held_logits is None:
            held_logits = logits.new_zeros(batch, self.num_slots)
        offered = (write_keys >= 0) & find_real_tokens(tokens.lengths, ids).unsqueeze(-1)
        found = Found(lookup, held_logits, logits, offered)
        if not tokens.keeps_state:
            return found, None
        final = scan(read_keys=read_keys, bounded=True) if scanned.slots is None else scanned
        assert final.slots is not None
        assert final.writers is not None
        entries = found.entries
        behind = entries.gather(1, final.writers) if entries.requires_grad else None
        return found, SelectiveState(final.slots, self._take_recent(stream, tokens.lengths), behind)

    def _follow(
        self, read_keys: Tensor, scan: Callable[[Tensor], SlotScan]
    ) -> tuple[SlotLookup, SlotScan]:
        """Return what all hops find, [B, T, Q] each, and the scan of the first one.

        What was found is asked for in turn; what is written does not depend on it.
        """
        scanned = scan(read_keys)
        lookups = [scanned.lookup]
        for _ in range(self.num_hops - 1):
            next_keys = lookups[-1].value_ids.masked_fill(lookups[-1].entries < 0, NO_KEY)
            lookups.append(scan(next_keys).lookup)
        joined = (torch.cat(parts, dim=-1) for parts in zip(*lookups, strict=True))
        return SlotLookup(*joined), scanned

    def weigh_reads(
        self, found: Found
    ) -> tuple[Tensor, Tensor, Tensor | None, HindsightScale | None]:
        """Return ln of the strength and the weight of each value found, both [B, T, Q].

        The last two are those of ``SelectiveRead``.
        """
        lookup = found.lookup
        exists = lookup.entries >= 0  # [B, T, Q]
        held = lookup.codes.to(found.logits.dtype) / CODES_PER_NAT
        # The value is that of the code, as the slots keep it; the gradient is the gate's.
        behind = found.entries.gather(1, lookup.entries.clamp_min(0).flatten(1)).view_as(held)
        held = held + behind - behind.detach()
        log_strength = logsigmoid(held).masked_fill(~exists, -torch.inf)
        scores = self.read_score + log_strength
        nothing = torch.zeros_like(scores[..., :1])
        log_weights = torch.cat([nothing, scores], dim=-1).log_softmax(dim=-1)[..., 1:]
        probe = scale = None
        if self.rules is not None and self.training:
            log_weights, probe, scale = watch_reads(
                log_weights, found.logits, lookup.entries, found.offered, self.num_slots, self.rules
            )
        return log_strength, log_weights.exp(), probe, scale

    def _ending(self, keys: Tensor, offset: int) -> Tensor:
        """Return the contexts that end ``offset`` tokens before each position, [B, T, N]."""
        first = self.num_recent - offset
        return keys[:, first : keys.shape[1] - offset]

    def _take_recent(self, stream: Tensor, lengths: Tensor | None) -> Tensor:
        """Return the last n real tokens of each row, [B, n] int32."""
        if lengths is None:
            return stream[:, stream.shape[1] - self.num_recent :].int()
        last = self.num_recent + torch.arange(-self.num_recent, 0, device=stream.device)  # [n]
        return stream.gather(1, lengths.unsqueeze(1) + last).int()
