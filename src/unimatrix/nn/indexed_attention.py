"""An exact index finds places in the text, a small attention reads around them."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, gelu, normalize

from unimatrix.configuration import UniMatrixConfig
from unimatrix.nn.key_ring import KeyRing, extend_ring, keep_ring
from unimatrix.nn.mixer import Mixer, Tokens
from unimatrix.nn.selective_mixer import normalize_features
from unimatrix.ops.indexed_attention import (
    BEFORE,
    MOST_MATCHED,
    NUM_OFFSETS,
    REACH,
    Entries,
    attend_entries,
    find_entries,
    sum_around,
)
from unimatrix.ops.text_index import (
    MOST_COUNTED,
    NUM_KINDS,
    NUM_RECENT,
    TextIndex,
    empty_index,
    order_tokens,
    search_new_text,
    search_text,
)

_SPAN = NUM_OFFSETS + 2 * REACH
"""Tokens around a place that the keys and values of its entries are made of."""
_FIRST_TEMPERATURE, _FIRST_OF_UNITS = 8.0, 3.0
_FIRST_BOUNDARY = -4.0
_NATS_OF_MATCH, _MATCHED = 0.5, 8
"""At the start each matched token before an entry adds to its score, up to the eighth."""


class Search(NamedTuple):
    """The text of every stream, and where its positions are sent.

    Attributes:
        text: [B, S] int64, the tokens remembered before these and these; -1 for none.
        places: [B, T, 5, 5] int32; see ``ops.text_index.Found``.
        new_units: [B, T] int32; likewise.
        carried: [B, W], the tokens of the index before these; ``None`` for new streams.
    """

    text: Tensor
    places: Tensor
    new_units: Tensor
    carried: Tensor | None


class IndexedRead(NamedTuple):
    """What every position read around its places, and what the pointer needs of it.

    Attributes:
        context: [B, T, D].
        token_ids: [B, T, E] int64, the tokens read; 0 for no entry.
        weights: [B, T, H, E], of each head; 0 for no entry.
    """

    context: Tensor
    token_ids: Tensor
    weights: Tensor


class IndexedAttention(Mixer):
    """Attend to the tokens around the places where the rarest of the last words stood before.

    Keys and values are made of the tokens of the text alone, so that the text and its index are all
    that is carried. A call makes them for the 104 tokens around each of its places, or for the
    whole window where that is less. Before the depth steps, ``search`` finds the places and, for
    the residual path, what followed the longest suffix: one text and one index serve both.

    Equation: E25 to E28, and E10 with a bound.
    Source: this project.

    Args:
        config: uses D, V, ``automaton_window`` and the ``index_*`` fields.
    """

    name, operator, part = "indexed_attention", "indexed_attention", "text and index"
    State, state_prefix, state_device = TextIndex, "index.", "cpu"

    def __init__(self, config: UniMatrixConfig) -> None:
        super().__init__()
        self.reads_at = config.index_reads_at
        assert config.automaton_window is not None
        self.window, self.vocab_size = config.automaton_window, config.vocab_size
        self.units = config.index_units
        self.num_heads = config.index_heads
        width, inner = config.hidden_size, config.index_heads * config.index_head_dim
        self.inner = inner
        self.query_proj = nn.Linear(width, inner, bias=False)
        self.unit_query_proj = nn.Linear(width, inner, bias=False)
        self.key_conv = nn.Parameter(torch.empty(2, width, REACH))
        self.key_mix = nn.Linear(width, width)
        self.key_proj = nn.Linear(width, inner, bias=False)
        self.value_proj = nn.Linear(width, inner, bias=False)
        self.out_proj = nn.Linear(inner, width, bias=False)
        self.offset_bias = nn.Linear(width, self.num_heads * NUM_OFFSETS)
        self.kind_bias = nn.Linear(width, self.num_heads * NUM_KINDS)
        self.nothing_score = nn.Linear(width, self.num_heads * (1 + NUM_RECENT))
        self.unit_kind = nn.Embedding(NUM_KINDS, inner)
        self.count_bias = nn.Embedding(MOST_COUNTED + 1, self.num_heads)
        self.age_bias = nn.Embedding(NUM_RECENT, self.num_heads)
        self.match_bias = nn.Parameter(torch.empty(self.num_heads, MOST_MATCHED + 1))
        of_values = (config.index_heads, 2 * config.index_head_dim + 1)
        self.boundary = nn.Parameter(torch.empty(of_values)) if config.index_boundaries else None
        self.log_temperature = nn.Parameter(torch.empty(self.num_heads))
        self.unit_log_temperature = nn.Parameter(torch.empty(self.num_heads))
        self.read_gate = nn.Linear(width, width)

    @classmethod
    def list_state_fields(cls, config: UniMatrixConfig) -> tuple[str, ...]:
        """Return what the index is of; see ``Mixer.list_state_fields``."""
        return ("index_units",) if config.associative_memory == "indexed" else ()

    def list_starts(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Return the parameters that start elsewhere than ``initializer_range`` says."""
        matched = torch.arange(MOST_MATCHED + 1).clamp(max=_MATCHED) * _NATS_OF_MATCH
        starts = [
            (self.key_conv, torch.randn(self.key_conv.shape) * REACH**-0.5),
            # The key behind nothing is of this bias alone, and 0 has no direction.
            (self.key_mix.bias, torch.linspace(-0.02, 0.02, len(self.key_mix.bias))),
            (self.match_bias, matched.expand(self.num_heads, -1)),
            (self.log_temperature, torch.full((self.num_heads,), _FIRST_TEMPERATURE).log()),
            (self.unit_log_temperature, torch.full((self.num_heads,), _FIRST_OF_UNITS).log()),
        ]
        if self.boundary is not None:
            boundary = torch.zeros_like(self.boundary)
            boundary[:, -1] = _FIRST_BOUNDARY
            starts.append((self.boundary, boundary))
        return starts

    @property
    def gate(self) -> nn.Module:
        """The read gate."""
        return self.read_gate

    def search(self, tokens: Tokens, state: TextIndex | None) -> tuple[Tokens, TextIndex | None]:
        """Find places and matches; see ``Mixer.search``."""
        ids, carried = tokens.ids, None if state is None else state.tokens
        empty = (self.window, self.vocab_size, self.units)
        text = ids
        if state is not None:
            text = torch.cat([order_tokens(state).to(ids.device), ids], dim=1)
        if torch.compiler.is_compiling() and not tokens.keeps_state and state is None:
            # Padding comes last, and nothing is read from it.
            places, new_units, matches = search_new_text(ids, *empty)
        else:
            index = empty_index(len(ids), *empty) if state is None else state
            (places, new_units, matches), index = search_text(
                ids,
                initial=index,
                lengths=tokens.lengths,
                in_place=tokens.gives_up_state or state is None,
                **self.operator_options,
            )
            state = index if tokens.keeps_state else None
        if tokens.suffix_match is not None:
            matches = tokens.suffix_match
        found = Search(text, places, new_units, carried)
        return tokens._replace(found=found, suffix_match=matches), state

    def forward(
        self, source: Tensor, tokens: Tokens, state: TextIndex | None
    ) -> tuple[IndexedRead, TextIndex | None]:
        """Read around the places that ``search`` has found; see ``Mixer.forward``."""
        text, places, new_units, carried = tokens.found
        distances = places[..., 0]
        entries = find_entries(text, distances, window=self.window, **self.operator_options)
        token_ids = entries.token_ids
        query, of_units, *biases = self.make_queries(source, places, new_units)
        biases[1] = biases[1] + self.score_units(of_units, text, places, tokens)
        ring, cut = self._find_ring(tokens), None
        if ring is not None:
            known = text.shape[1] - tokens.ids.shape[1]
            inputs = [query, ring.keys, ring.values, *biases]
            entries = ring.place(entries, tokens.num_before, known)
        else:
            can_cut = carried is not None and not torch.compiler.is_compiling()
            cut = _cut_out(text, distances, entries) if can_cut else None
            needed = None
            if cut is not None:
                text, entries = cut
            elif not torch.compiler.is_compiling():
                needed = find_needed(distances, text.shape[1])
            inputs = [query, *self.make_keys(text, tokens, needed), *biases]
        if cut is not None:  # all rows read from one list of pieces
            inputs = [_join_rows(tensor) for tensor in inputs]
        inputs = [tensor.to(query.dtype) for tensor in (*inputs, self.match_bias)]
        boundary = None if self.boundary is None else self.boundary.to(query.dtype)
        context, weights = attend_entries(
            entries, *inputs, boundary=boundary, **self.operator_options
        )
        context = self.out_proj(context.reshape(*tokens.ids.shape, -1).to(source.dtype))
        weights = weights.view(*tokens.ids.shape, self.num_heads, -1)
        if ring is not None and state is not None:
            lengths = tokens.ids.shape[1] if tokens.lengths is None else tokens.lengths
            keep_ring(ring, state.tokens, tokens.num_before + lengths)
        return IndexedRead(context, token_ids, weights), state

    def _find_ring(self, tokens: Tokens) -> KeyRing | None:
        """Return the keys of the window and these tokens, where they are kept from call to call."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or not tokens.keeps_state:
            return None
        text, *_, carried = tokens.found
        own = (self.key_conv, *self.key_mix.parameters(), *self.key_proj.parameters())
        weights = [*own, *self.value_proj.parameters(), *tokens.embed_weights()]
        return extend_ring(
            text,
            tokens.num_before,
            tokens.ids.shape[1],
            self.window,
            self.inner,
            carried,
            weights,
            lambda piece: self.make_keys(piece, tokens),
        )

    def make_queries(
        self, source: Tensor, places: Tensor, new_units: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return what positions look for.

        Args:
            source: [B, T, D], the stream.
            places: [B, T, 5, 5] int32.
            new_units: [B, T] int32.

        Returns:
            [B, T, H, C] twice, the queries of entries and of the units that send to places;
            [B, T, H, 80] and [B, T, H, 5], what is added to the score of an entry by its offset and
            by its place, less the score of nothing.
        """
        h = normalize_features(source)
        heads = (*h.shape[:2], self.num_heads, -1)
        # Scores are compared and summed over hundreds of entries: no 16-bit numbers.
        dtype = torch.promote_types(h.dtype, torch.float32)
        asked = (
            (self.query_proj, self.log_temperature),
            (self.unit_query_proj, self.unit_log_temperature),
        )
        query, of_unit = (
            normalize(proj(h).view(heads).to(dtype), dim=-1) * temperature.exp().unsqueeze(-1)
            for proj, temperature in asked
        )
        _, times, ages, kinds, _ = places.unbind(dim=-1)
        of_units = (self.count_bias(times) + self.age_bias(ages)).transpose(2, 3)
        chosen = kinds.unsqueeze(2).expand(-1, -1, self.num_heads, -1).long()
        of_places = self.kind_bias(h).view(heads).gather(3, chosen) + of_units
        marks = new_units.unsqueeze(-1) >> torch.arange(NUM_RECENT, device=h.device) & 1
        always, of_new = self.nothing_score(h).view(heads).split([1, NUM_RECENT], dim=-1)
        of_nothing = always + (of_new * marks.unsqueeze(2)).sum(dim=-1, keepdim=True)
        of_places = of_places - of_nothing
        return query, of_unit, self.offset_bias(h).view(heads), of_places

    def make_keys(
        self, text: Tensor, tokens: Tokens, needed: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return what the tokens of a text are found by, and what they say.

        Args:
            text: [B, S] int64, -1 for no token.
            tokens: whose ``embed`` is used.
            needed: [B, S, 2] bool, the keys that are read: the others are zeros, and cost nothing
                behind the convolutions. ``None`` is all.

        Returns:
            [B, 2 S, H, C], two keys of each token: of the 12 before it, and of the 12 from it on as
            well. [B, S, H, C], the values.
        """
        batch, num_columns = text.shape
        features = self._embed_text(text, tokens)  # [B, S, D]
        rows = None if needed is None else needed.flatten().nonzero().squeeze(1)
        kernels = self.key_conv.to(features.dtype)
        sums = sum_around(features, kernels, rows, **self.operator_options)
        keys = self._finish_keys(sums)
        if rows is not None:
            none = keys.new_zeros(2 * batch * num_columns, *keys.shape[1:])
            keys = none.index_copy(0, rows, keys)
        values = self.value_proj(features).view(batch, num_columns, self.num_heads, -1)
        return keys.view(batch, 2 * num_columns, *keys.shape[1:]), values

    def score_units(self, queries: Tensor, text: Tensor, places: Tensor, tokens: Tokens) -> Tensor:
        """Return what is added to the score of a place by what stands around its unit now.

        Args:
            queries: [B, T, H, C], what positions look for in the unit that sends to a place.
            text: [B, S] int64, of which the last T tokens are the positions.
            places: [B, T, 5, 5] int32.
            tokens: whose ``embed`` is used.

        Returns:
            [B, T, H, 5]; 0 for no place, and for a unit that was known more than W - 17 tokens ago.
        """
        num_columns, num_tokens = text.shape[1], places.shape[1]
        now = torch.arange(num_columns - num_tokens, num_columns, device=text.device).view(1, -1, 1)
        distances, _, _, kinds, since = places.unbind(dim=-1)
        exists = (distances >= 0) & (since < self.window - MOST_MATCHED)
        # The key is that of the token behind the one with which the unit was known.
        first = torch.arange(len(text), device=text.device).view(-1, 1, 1) * num_columns
        rows = 2 * (first + now - since) + (since >= REACH)
        rows = rows.masked_fill(~exists, 0)
        if torch.compiler.is_compiling():  # where nothing is as long as the values say
            rows, numbers = torch.arange(2 * text.numel(), device=text.device), rows
        else:
            rows, numbers = torch.unique(rows, return_inverse=True)
        known_at, sees_ahead = (rows // 2).unsqueeze(1), (rows % 2 == 1).unsqueeze(1)
        span = torch.arange(1 - REACH, 1 + REACH, device=text.device)
        columns = known_at % num_columns + span
        is_seen = (columns >= 0) & (columns < num_columns) & ((span <= 0) | sees_ahead)
        pieces = text[known_at // num_columns, columns.clamp(0, num_columns - 1)]
        features = self._embed_text(pieces.masked_fill(~is_seen, -1), tokens)  # [n, 24, D]
        keys = self._finish_keys((features * self.key_conv.mT.flatten(0, 1)).sum(dim=1))
        # Called, not read: its weights may lie elsewhere until then.
        by_kind = self.unit_kind(torch.arange(NUM_KINDS, device=keys.device)).to(keys.dtype)
        by_kind = by_kind.view(NUM_KINDS, self.num_heads, -1)
        of_kinds = torch.einsum("nhc,khc->nkh", keys, by_kind).flatten(0, 1)
        # Looked up like embeddings, whose gradients are summed row by row.
        of_kinds = embedding(NUM_KINDS * numbers + kinds, of_kinds)  # [B, T, 5, H]
        chosen = embedding(numbers, keys.flatten(1)).view(*numbers.shape, *keys.shape[1:])
        scores = torch.einsum("bthc,btphc->btph", queries, chosen) + of_kinds
        return (scores * exists.unsqueeze(-1)).transpose(2, 3)

    @staticmethod
    def _embed_text(text: Tensor, tokens: Tokens) -> Tensor:
        """Return the features [*, D] of tokens [*], 0 for no token."""
        return normalize_features(tokens.embed(text.clamp_min(0))) * (text >= 0).unsqueeze(-1)

    def _finish_keys(self, seen: Tensor) -> Tensor:
        """Return the keys [*, H, C] of what the convolutions have seen, [*, D]."""
        mixed = normalize_features(self.key_mix(gelu(seen)))
        keys = self.key_proj(mixed).unflatten(-1, (self.num_heads, -1))
        # The smallest length of a vector is no 16-bit number.
        keys = keys.to(torch.promote_types(keys.dtype, torch.float32))
        return normalize(keys, dim=-1)


def find_needed(distances: Tensor, num_columns: int) -> Tensor:
    """Return which keys of a text positions may read, [B, S, 2] bool: past-only ones, and whole.

    Args:
        distances: [B, T, P] int32, as in ``find_entries``.
        num_columns: S.
    """
    batch, num_tokens, _ = distances.shape
    now = torch.arange(num_columns - num_tokens, num_columns, device=distances.device).view(
        1, -1, 1
    )
    first = (now - distances - BEFORE).flatten(1)
    last = torch.minimum(first + NUM_OFFSETS - 1, now.expand_as(distances).flatten(1))
    whole = (now - REACH + 1).expand_as(distances).flatten(1)  # the last column known on both sides
    exists, found = distances.flatten(1) >= 0, []
    for start, end in ((first.maximum(whole + 1), last), (first, last.minimum(whole))):
        start = start.clamp_min(0)
        # One more place from its first column on, one less behind its last.
        change = (exists & (start <= end)).int()
        counts = change.new_zeros(batch, num_columns + 1)
        counts.scatter_add_(1, start.clamp_max(num_columns), change)
        counts.scatter_add_(1, (end + 1).clamp_min(0), -change)
        found.append(counts[:, :-1].cumsum(dim=1) > 0)
    return torch.stack(found, dim=-1)


def _cut_out(text: Tensor, distances: Tensor, entries: Entries) -> tuple[Tensor, Entries] | None:
    """Return the pieces of text around all places, each once, ``None`` if they are no less.

    Args:
        text: [B, S] int64.
        distances: [B, T, P] int32.
        entries: those of ``find_entries`` in the text.

    Returns:
        [n, 104] int64, -1 outside the text; the entries in these pieces, one after the other, as
        those of a single stream of B T tokens.
    """
    batch, num_columns = text.shape
    num_tokens = distances.shape[1]
    now = torch.arange(num_columns - num_tokens, num_columns, device=text.device).view(1, -1, 1)
    first = torch.arange(batch, device=text.device).view(-1, 1, 1) * num_columns
    places = (first + now - distances).masked_fill(distances < 0, -1)
    places, numbers = torch.unique(places, return_inverse=True)  # [n], [B, T, P]
    if len(places) * _SPAN >= text.numel():
        return None
    span = torch.arange(-BEFORE - REACH, _SPAN - BEFORE - REACH, device=text.device)
    columns = (places % num_columns).unsqueeze(1) + span  # [n, 104]
    rows = (places.clamp_min(0) // num_columns).unsqueeze(1)
    pieces = text[rows, columns.clamp(0, num_columns - 1)]
    pieces = pieces.masked_fill((columns < 0) | (columns >= num_columns), -1)
    offsets = torch.arange(REACH, REACH + NUM_OFFSETS, device=text.device)
    in_pieces = 2 * (numbers.unsqueeze(-1) * _SPAN + offsets).flatten(2) + entries.rows % 2
    in_pieces = in_pieces.int().where(entries.rows >= 0, -1)
    entries = entries._replace(rows=in_pieces)
    return pieces, Entries(*(_join_rows(part) for part in entries))


def _join_rows(features: Tensor) -> Tensor:
    """Return features [B, T, *] of all rows as those of one, [1, B T, *]."""
    return features.flatten(0, 1).unsqueeze(0)
