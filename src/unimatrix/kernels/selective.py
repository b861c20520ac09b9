"""The selective slots with what layers make of embeddings alone made once, for the vocabulary."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding, embedding_bag, gelu, linear, pad

from unimatrix.kernels.passes.weights import NUM_LANES
from unimatrix.nn.mixer import Tokens
from unimatrix.nn.selective_mixer import (
    SelectiveMixer,
    SelectiveRead,
    SelectiveState,
    normalize_features,
)


class SelectiveRun(NamedTuple):
    """The mixer's ``forward`` over a table of the vocabulary.

    Attributes:
        mixer: whose weights they are.
        embedding: [V, D], of the tokens.
        runs_compiled: whether gate and read are compiled passes.
    """

    mixer: SelectiveMixer
    embedding: Tensor
    runs_compiled: bool

    def __call__(
        self, source: Tensor, tokens: Tokens, state: SelectiveState | None
    ) -> tuple[SelectiveRead, SelectiveState | None]:
        """Look up, write and read at every position; as ``SelectiveMixer.forward``."""
        mixer = self.mixer
        if self.runs_compiled:
            # Imported here, as in what follows: it loads the compiler.
            from unimatrix.kernels.passes.row_norm_native import normalize_rows_native

            eps = torch.finfo(self.embedding.dtype).eps
            table = normalize_rows_native(self.embedding, None, eps)  # [V, D]
        else:
            table = normalize_features(self.embedding)
        stream = mixer.join_stream(tokens.ids, state)
        logits = self._weigh_writes(source, table, stream)
        found, state = mixer.look_up(tokens, stream, logits, state)
        values = linear(table, mixer.value_proj.weight)  # [V, D]
        value_ids = found.lookup.value_ids
        if self.runs_compiled:
            from unimatrix.ops.selective_slots.read_native import read_found_native

            rules = mixer.rules if mixer.training else None
            entries = (found.logits, found.held_logits, mixer.read_score, values)
            read = read_found_native(found.lookup, *entries, found.offered, rules)
            context, log_strength, probe, scale = read
        else:
            log_strength, weights, probe, scale = mixer.weigh_reads(found)
            flat = weights.flatten(0, 1).to(values.dtype)
            ids = value_ids.flatten(0, 1)
            mixed = embedding_bag(ids, values, per_sample_weights=flat, mode="sum")
            context = mixed.view(*tokens.ids.shape, -1)
        return SelectiveRead(context, value_ids, log_strength, probe, scale), state

    def _weigh_writes(self, source: Tensor, table: Tensor, stream: Tensor) -> Tensor:
        """Return the logit of each write's strength, [B, T, N]."""
        mixer, width = self.mixer, table.shape[1]
        of_last, of_this, *of_source = torch.split(mixer.gate_up.weight, width, dim=1)
        after, here = linear(table, of_last), linear(table, of_this, mixer.gate_up.bias)
        down = mixer.gate_down
        if self.runs_compiled and not of_source and after.shape[1] % NUM_LANES == 0:
            from unimatrix.ops.selective_slots.gate_native import weigh_writes_native

            layers = (after, here, down.weight, down.bias)
            return weigh_writes_native(stream, mixer.num_recent, *layers)
        pair = stream[:, mixer.num_recent - 1 :]  # [B, 1 + T], -1 before the first token
        # [1 + V, D / 2], zeros for none
        up = embedding(pair[:, :-1] + 1, pad(after, (0, 0, 1, 0))) + embedding(pair[:, 1:], here)
        if of_source:
            up = up + linear(normalize_features(source), of_source[0])
        logits: Tensor = down(gelu(up))
        return logits
