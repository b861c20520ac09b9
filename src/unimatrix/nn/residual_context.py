"""What followed last time: one context vector per position, from the token ids alone."""

import torch
from torch import Tensor, nn

from unimatrix.configuration import UniMatrixConfig
from unimatrix.nn.embed_tokens import embed_tokens
from unimatrix.nn.previous_token import shift_to_previous
from unimatrix.ops import opaque
from unimatrix.ops.suffix_automaton import AutomatonState, predict_from_suffix


class ResidualContext(nn.Module):
    """Embed the previous token, or the token that followed the longest earlier match.

    Equation: E10.
    Source: RWKV-8 ROSA (suffix automaton); the published code's ROSA (previous token);
    ``docs/deviations.md`` D6.

    Args:
        config: uses V, D, ``residual_path``, ``automaton_window`` and ``pad_token_id``.
    """

    def __init__(self, config: UniMatrixConfig) -> None:
        super().__init__()
        self.uses_automaton = config.residual_path == "suffix_automaton"
        self.window = config.automaton_window
        self.pad_token_id = config.pad_token_id
        self.backend = "auto"
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)

    def forward(
        self,
        input_ids: Tensor,
        last_token_ids: Tensor | None,
        automaton: AutomatonState | None,
        lengths: Tensor | None,
        *,
        in_place: bool = False,
        keeps_state: bool = True,
        passes: str = "auto",
    ) -> tuple[Tensor, AutomatonState | None, tuple[Tensor, Tensor] | None]:
        """Return the context of every position and the automaton after the last real token.

        Args:
            input_ids: [B, T] int64.
            last_token_ids: [B] int64, the previous real token, -1 where there is none; ``None`` is
                none anywhere.
            automaton: the automaton so far; ``None`` is empty.
            lengths: [B] int64, real tokens of each row; ``None`` is T for all.
            in_place: change the tensors of ``automaton``, which the caller then gives up.
            keeps_state: return the automaton.
            passes: back end of the fused passes.

        Returns:
            [B, T, D], zero where nothing matched; the automaton, if it is kept; its predicted ids
            and match lengths, [B, T] int64 each (both ``None`` with previous_token).
        """
        if not self.uses_automaton:
            if last_token_ids is None:
                last_token_ids = torch.full_like(input_ids[:, 0], -1)
            first = last_token_ids.masked_fill(last_token_ids < 0, self.pad_token_id)
            return self.embed(shift_to_previous(input_ids, first)), None, None
        if torch.compiler.is_compiling() and not keeps_state and automaton is None:
            # Padding comes last, and nothing is read from it.
            match = opaque.match_suffixes(input_ids, self.window).unbind(dim=-1)
            return self.embed_predicted(match[0], passes), None, match
        prediction, automaton = predict_from_suffix(
            input_ids.cpu(),
            lengths=None if lengths is None else lengths.cpu(),
            initial=automaton,
            window=self.window,
            in_place=in_place,
            keeps_state=keeps_state,
            backend=self.backend,
        )
        device = input_ids.device
        match = prediction.predicted_ids.to(device), prediction.match_lengths.to(device)
        return self.embed_predicted(match[0], passes), automaton, match

    def embed_predicted(self, predicted_ids: Tensor, passes: str = "auto") -> Tensor:
        """Return the context [B, T, D] of the automaton's predicted ids [B, T], -1 for none."""
        return embed_tokens(self.embed, predicted_ids, allows_none=True, backend=passes)
