"""What followed last time: one context vector per position, from the token ids alone."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from unimatrix.configuration import UniMatrixConfig
from unimatrix.nn.mixer import Mixer, Tokens
from unimatrix.nn.previous_token import shift_to_previous
from unimatrix.ops.suffix_automaton import (
    AutomatonState,
    SuffixState,
    match_suffixes,
    predict_from_suffix,
)
from unimatrix.ops.text_index import TextIndex


class ResidualRead(NamedTuple):
    """What the residual path says of every position.

    Attributes:
        context: [B, T, D], zero where nothing matched.
        predicted_ids: [B, T] int64, -1 where nothing matched.
        match_lengths: [B, T] int64, 0 where nothing matched; ``None`` with previous_token.
    """

    context: Tensor
    predicted_ids: Tensor
    match_lengths: Tensor | None


class ResidualContext(Mixer):
    """Embed the previous token, or the token that followed the longest earlier match.

    Its gate is the block's ``context_gate``.

    Equation: E10.
    Source: RWKV-8 ROSA (suffix automaton); the published code's ROSA (previous token);
    ``docs/deviations.md`` D6.

    Args:
        config: uses V, D, ``residual_path``, ``automaton_window`` and ``pad_token_id``.
    """

    name, operator, part = "residual_context", "suffix_automaton", "automaton"
    State, state_prefix, state_device = AutomatonState, "automaton.", "cpu"
    other_states, chosen_by = (TextIndex,), "residual_path"

    def __init__(self, config: UniMatrixConfig) -> None:
        super().__init__()
        self.reads_at, self.reads_ids = 0, True
        self.uses_automaton = config.residual_path == "suffix_automaton"
        self.window, self.vocab_size = config.automaton_window, config.vocab_size
        # An index of the text finds what an automaton would.
        self.is_told = config.associative_memory == "indexed"
        self.pad_token_id = config.pad_token_id
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)

    @classmethod
    def list_state_fields(cls, config: UniMatrixConfig) -> tuple[str, ...]:
        """See ``Mixer.list_state_fields``."""
        return ("residual_path", "automaton_window")

    @property
    def runs_operator(self) -> bool:
        """Whether the automaton runs."""
        return self.uses_automaton and not self.is_told

    @property
    def grows(self) -> bool:
        """An automaton without a window keeps the whole text."""
        return self.uses_automaton and self.window is None

    def forward(
        self, source: Tensor, tokens: Tokens, state: SuffixState | None
    ) -> tuple[ResidualRead, SuffixState | None]:
        """Embed what each position is told; see ``Mixer.forward``."""
        predicted, lengths, state = self.predict(tokens, state)
        if self.uses_automaton:
            context = self.embed(predicted.clamp(min=0)) * (predicted >= 0).unsqueeze(-1)
        else:
            context = self.embed(predicted)
        return ResidualRead(context, predicted, lengths), state

    def predict(
        self, tokens: Tokens, state: SuffixState | None
    ) -> tuple[Tensor, Tensor | None, SuffixState | None]:
        """Return the id that each position is told and its match length, and the state afterwards.

        A mixer with an index of the text has found it with the index.

        Returns:
            [B, T] int64, -1 for none; [B, T] int64, ``None`` with previous_token; the automaton.
        """
        if not self.uses_automaton:
            first = tokens.last_ids.masked_fill(tokens.last_ids < 0, self.pad_token_id)
            return shift_to_previous(tokens.ids, first), None, None
        if tokens.suffix_match is not None:
            return tokens.suffix_match[..., 0], tokens.suffix_match[..., 1], None
        if torch.compiler.is_compiling() and not tokens.keeps_state and state is None:
            # Padding comes last, and nothing is read from it.
            match = match_suffixes(tokens.ids, self.window)
            return match[..., 0], match[..., 1], None
        prediction, state = predict_from_suffix(
            tokens.ids.cpu(),
            lengths=None if tokens.lengths is None else tokens.lengths.cpu(),
            initial=state,
            window=self.window,
            vocab_size=self.vocab_size,
            in_place=tokens.gives_up_state,
            keeps_state=tokens.keeps_state,
            **self.operator_options,
        )
        device = tokens.ids.device
        return prediction.predicted_ids.to(device), prediction.match_lengths.to(device), state
