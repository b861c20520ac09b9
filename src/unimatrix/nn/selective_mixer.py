"""Contexts, gate, read and pointer around the selective slots."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, embedding_bag, gelu, linear, logsigmoid, pad

from unimatrix.configuration import UniMatrixConfig
from unimatrix.kernels.passes import normalize_rows
from unimatrix.kernels.passes.weights import NUM_LANES
from unimatrix.nn.packed_linear import is_plain
from unimatrix.ops.checks import find_real_tokens, is_autocast
from unimatrix.ops.hindsight import HindsightRules, HindsightScale, watch_reads
from unimatrix.ops.selective_slots import (
    CODES_PER_NAT,
    MAX_CODE,
    MIN_CODE,
    NO_KEY,
    SelectiveSlots,
    SlotLookup,
    SlotScan,
    empty_selective_slots,
    hash_contexts,
    scan_selective_slots,
)

_FIRST_READ_SCORE = 4.0
_COMPILED = ("auto", "native")  # back ends with which gate and read are compiled, too


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
        elsewhere: [B, T, Q] zeros to add to the pointer's log weights (``ops.hindsight``).
        scale: to be added to the loss; both are ``None`` where nothing is learned in hindsight.
    """

    context: Tensor
    token_ids: Tensor
    log_strength: Tensor
    elsewhere: Tensor | None
    scale: HindsightScale | None


class _Values(NamedTuple):
    """Normalised and projected embeddings of what was found.

    Attributes:
        embed: the token embedding.
        proj: of the normalised embeddings.
        table: all of them normalised and projected, [V, D], or ``None``.
    """

    embed: nn.Embedding
    proj: nn.Linear
    table: Tensor | None

    def mix(self, token_ids: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted sums [B, T, D] of the values of ids [B, T, Q]."""
        if self.table is None:
            values = self.embed(token_ids)  # [B, T, Q, D]
            mixed = (weights.unsqueeze(-1) * _normalize(values)).sum(dim=2)
            projected: Tensor = self.proj(mixed.to(values.dtype))
            return projected
        # Elsewhere than here, earlier releases of torch have no such kernel.
        if self.table.device.type not in ("cpu", "cuda"):
            return (weights.unsqueeze(-1) * embedding(token_ids, self.table)).sum(dim=2)
        mixed = embedding_bag(
            token_ids.flatten(0, 1),
            self.table,
            per_sample_weights=weights.flatten(0, 1).to(self.table.dtype),
            mode="sum",
        )
        return mixed.view(*token_ids.shape[:2], -1)


def _normalize(vectors: Tensor) -> Tensor:
    """Return vectors [..., D] over their root mean square."""
    return normalize_rows(vectors, None, torch.finfo(vectors.dtype).eps)


def _join_entries(held_logits: Tensor, logits: Tensor) -> Tensor:
    """Return the logits of slots [B, M] and writes [B, T, N] by entry, [B, M + T N]."""
    return torch.cat([held_logits, logits.flatten(1)], dim=1)


class SelectiveMixer(nn.Module):
    """Look the recent contexts up, and offer the one before to the slots.

    Equation: E13 to E16, E21.
    Source: this project.

    Args:
        config: uses D, V, M, the ``slot_*`` fields and the ``hindsight*`` fields.
    """

    def __init__(self, config: UniMatrixConfig) -> None:
        super().__init__()
        self.backend = "auto"
        self.patterns = [list(pattern) for pattern in config.slot_key_patterns]
        self.read_offsets = list(config.slot_read_offsets)
        self.num_slots = config.num_slots
        self.bounded_training = config.bounded_training
        self.vocab_size = config.vocab_size
        self.margin = round(config.slot_margin * CODES_PER_NAT)
        self.keep_first = config.repeated_key == "first"
        self.fade_tokens = config.slot_fade_tokens
        self.reads_hidden = config.slot_source == "hidden"
        self.rules = None
        if config.hindsight != "none":
            self.rules = HindsightRules(
                config.hindsight,
                config.hindsight_share,
                config.hindsight_floor,
                config.hindsight_weight,
            )
        farthest = max(max(pattern) for pattern in self.patterns)
        # A write's context ends one token back, a read's as many as its offset.
        self.num_recent = farthest + max(1, *self.read_offsets)
        width, num_patterns = config.hidden_size, len(self.patterns)
        self.num_hops = config.slot_hops
        self.num_reads = num_patterns * len(self.read_offsets) * self.num_hops
        gate_inputs = (3 if self.reads_hidden else 2) * width
        self.gate_up = nn.Linear(gate_inputs, width // 2)
        self.gate_down = nn.Linear(width // 2, num_patterns)
        self.read_score = nn.Parameter(torch.empty(self.num_reads))
        self.value_proj = nn.Linear(width, width, bias=False)
        self.read_gate = nn.Linear(width, width)

    def list_starts(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Return the parameters that start elsewhere: a read is clearly above reading nothing."""
        return [(self.read_score, torch.full((self.num_reads,), _FIRST_READ_SCORE))]

    def retrieve(
        self,
        embed: nn.Embedding,
        token_ids: Tensor,
        hidden: Tensor | None,
        *,
        state: SelectiveState | None,
        num_before: Tensor,
        lengths: Tensor | None,
        keeps_state: bool,
    ) -> tuple[SelectiveRead, SelectiveState | None]:
        """Run the slots over a sequence.

        Args:
            embed: the token embedding.
            token_ids: [B, T] int64.
            hidden: [B, T, D], the stream that the gate sees, with the hidden source.
            state: slots and recent tokens before; ``None`` is an empty stream.
            num_before: [B] int64, tokens of the stream before these.
            lengths: [B] int64, real tokens of each row; ``None`` is T for all.
            keeps_state: return the state after the last real token. Training looks up in slots
                without a bound, whatever is kept.

        Returns:
            what each position found, and the state.
        """
        batch = token_ids.shape[0]
        if state is None:
            slots = empty_selective_slots(
                batch, self.num_slots, self.vocab_size, device=token_ids.device
            )
            recent = token_ids.new_full((batch, self.num_recent), -1)
        else:
            slots, recent = state.slots, state.recent_token_ids.long()
        stream = torch.cat([recent, token_ids], dim=1)  # [B, n + T]
        keys = hash_contexts(stream, self.patterns)  # [B, n + T, N]
        table = self._normalize_table(embed, token_ids.numel())
        logits, codes = self._weigh_writes(embed, table, stream, hidden)  # [B, T, N]
        write_keys = self._ending(keys, 1)

        def scan(read_keys: Tensor, bounded: bool) -> SlotScan:
            return scan_selective_slots(
                read_keys,
                write_keys,
                token_ids,
                codes,
                initial=slots,
                bounded=bounded,
                margin=self.margin,
                keep_first=self.keep_first,
                fade_tokens=self.fade_tokens,
                first_position=num_before,
                lengths=lengths,
                backend=self.backend,
            )

        read_keys = torch.cat([self._ending(keys, offset) for offset in self.read_offsets], dim=-1)
        bounded = self.bounded_training or not self.training
        scanned = scan(read_keys, bounded)
        lookups = [scanned.lookup]
        for _ in range(self.num_hops - 1):
            # What was found is asked for in turn; what is written does not depend on it.
            asked = lookups[-1].value_ids.masked_fill(lookups[-1].entries < 0, NO_KEY)
            lookups.append(scan(asked, bounded).lookup)
        lookup = SlotLookup(*(torch.cat(parts, dim=-1) for parts in zip(*lookups, strict=True)))
        held_logits = logits.new_zeros(batch, self.num_slots)
        if state is not None and state.logits is not None:
            held_logits = state.logits
        kept = None
        if keeps_state:
            final = scan(read_keys, bounded=True) if scanned.slots is None else scanned
            assert final.slots is not None
            assert final.writers is not None
            entries = _join_entries(held_logits, logits)
            behind = entries.gather(1, final.writers) if entries.requires_grad else None
            kept = SelectiveState(final.slots, self._take_recent(stream, lengths), behind)
        offered = (write_keys >= 0) & find_real_tokens(lengths, token_ids).unsqueeze(-1)
        projected = None if table is None else linear(table, self.value_proj.weight)
        values = _Values(embed, self.value_proj, projected)
        return self._read(values, lookup, held_logits, logits, offered), kept

    def _normalize_table(self, embed: nn.Embedding, num_tokens: int) -> Tensor | None:
        """Return every token's embedding over its root mean square, [V, D].

        What layers make of embeddings alone is made of V rows then, not of every position. ``None``
        where there are fewer positions, where a layer is more than its weights, and in less than 32
        bits, of which a sum of two products would keep fewer than one product of both.
        """
        if not all(map(is_plain, (embed, self.gate_up, self.gate_down, self.value_proj))):
            return None
        weight = embed.weight
        is_narrow = weight.dtype not in (torch.float32, torch.float64)
        if embed.num_embeddings > num_tokens or is_narrow or is_autocast(weight.device.type):
            return None
        return _normalize(weight)

    def _is_compiled(self, table: Tensor | None) -> bool:
        """Return whether gate and read, which need every token's features, are compiled passes."""
        is_here = table is not None and table.device.type == "cpu"
        return is_here and self.backend in _COMPILED and not torch.compiler.is_compiling()

    def _weigh_writes(
        self, embed: nn.Embedding, table: Tensor | None, stream: Tensor, hidden: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the logit of each write's strength and its code, int64, [B, T, N] each."""
        pair = stream[:, self.num_recent - 1 :]  # [B, 1 + T], -1 before the first token
        if table is None:
            features = _normalize(embed(pair.clamp_min(0)) * (pair >= 0).unsqueeze(-1))
            inputs = [features[:, :-1], features[:, 1:]]
            if hidden is not None:
                inputs.append(_normalize(hidden))
            up = self.gate_up(torch.cat(inputs, dim=-1))
        else:
            of_last, of_this, *of_hidden = torch.split(self.gate_up.weight, table.shape[1], dim=1)
            after, here = linear(table, of_last), linear(table, of_this, self.gate_up.bias)
            if hidden is None and after.shape[1] % NUM_LANES == 0 and self._is_compiled(table):
                # Imported here: it loads the compiler.
                from unimatrix.ops.selective_slots.gate_native import weigh_writes_native

                down = self.gate_down
                return weigh_writes_native(
                    stream, self.num_recent, after, here, down.weight, down.bias
                )
            # [1 + V, D / 2], zeros for none
            up = embedding(pair[:, :-1] + 1, pad(after, (0, 0, 1, 0))) + embedding(
                pair[:, 1:], here
            )
            if hidden is not None:
                up = up + linear(_normalize(hidden), of_hidden[0])
        logits: Tensor = self.gate_down(gelu(up))
        # Strengths are carried and compared: no fewer digits than the state has.
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        codes = (logits.detach() * CODES_PER_NAT).round().clamp(MIN_CODE, MAX_CODE).long()
        return logits, codes

    def _ending(self, keys: Tensor, offset: int) -> Tensor:
        """Return the contexts that end ``offset`` tokens before each position, [B, T, N]."""
        first = self.num_recent - offset
        return keys[:, first : keys.shape[1] - offset]

    def _take_recent(self, stream: Tensor, lengths: Tensor | None) -> Tensor:
        """Return the last n real tokens of each row, [B, n] int32."""
        last = self.num_recent + torch.arange(-self.num_recent, 0, device=stream.device)  # [n]
        if lengths is None:
            taken = stream[:, stream.shape[1] - self.num_recent :]
        else:
            taken = stream.gather(1, lengths.unsqueeze(1) + last)
        return taken.int()

    def _read(
        self,
        values: _Values,
        lookup: SlotLookup,
        held_logits: Tensor,
        logits: Tensor,
        offered: Tensor,
    ) -> SelectiveRead:
        """Weigh what was found and mix its values."""
        rules = self.rules if self.training else None
        if values.table is not None and self._is_compiled(values.table):
            # Imported here: it loads the compiler.
            from unimatrix.ops.selective_slots.read_native import read_found_native

            given = (logits, held_logits, self.read_score, values.table, offered, rules)
            context, log_strength, elsewhere, scale = read_found_native(lookup, *given)
            return SelectiveRead(context, lookup.value_ids, log_strength, elsewhere, scale)
        entries = _join_entries(held_logits, logits)
        found = lookup.entries >= 0  # [B, T, Q]
        held = lookup.codes.to(logits.dtype) / CODES_PER_NAT
        # The value is that of the code, as the slots keep it; the gradient is the gate's.
        behind = entries.gather(1, lookup.entries.clamp_min(0).flatten(1)).view_as(held)
        held = held + behind - behind.detach()
        log_strength = logsigmoid(held).masked_fill(~found, -torch.inf)
        scores = self.read_score + log_strength
        nothing = torch.zeros_like(scores[..., :1])
        log_weights = torch.cat([nothing, scores], dim=-1).log_softmax(dim=-1)[..., 1:]
        elsewhere = scale = None
        if rules is not None:
            log_weights, elsewhere, scale = watch_reads(
                log_weights, logits, lookup.entries, offered, self.num_slots, rules
            )
        weights = log_weights.exp()  # [B, T, Q]
        context = values.mix(lookup.value_ids, weights)
        return SelectiveRead(context, lookup.value_ids, log_strength, elsewhere, scale)
