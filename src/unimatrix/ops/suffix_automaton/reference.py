"""The definition of the longest earlier suffix, at quadratic cost: the oracle of the others."""

import torch

from unimatrix.ops.suffix_automaton.storage import NUM_HELD, NUM_TOKENS, WINDOW, AutomatonState


def predict_by_definition(
    tokens: torch.Tensor, first: int, window: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find, after every token of one stream, the longest suffix that occurred before.

    Equation: E10. For the largest m, then the largest j < t, with id_{j-m..j} = id_{t-m..t}:
        p_t = id_{j+1} and the match length is m + 1; p_t = -1 and 0 if even id_t is new.
        With a window W, j - m >= max(0, (t // W - 1) W) as well.
    Source: paper, residual path; RWKV-8 ROSA.

    Args:
        tokens: ``[n]`` int64, the stream's tokens ``first`` .. ``first + n - 1``.
        first: how many tokens of the stream came before; none of them is in a window.
        window: W, or ``None`` for no bound.

    Returns:
        Predicted ids and match lengths, ``[n]`` int64 each.

    Cost:
        O(n^2) time, O(n) memory.
    """
    n = tokens.shape[0]
    predicted_ids, match_lengths = torch.full_like(tokens, -1), torch.zeros_like(tokens)
    index = torch.arange(n)
    common = torch.zeros_like(tokens)  # of j: the common suffix of id_0..id_j and id_0..id_t
    for t in range(n):
        start = 0 if window is None else max(0, ((first + t) // window - 1) * window - first)
        before = torch.cat([common.new_zeros(1), common[:-1]])
        common = torch.where((tokens == tokens[t]) & (index < t), before + 1, 0)
        inside = torch.minimum(common, index - start + 1)[:t]
        if t > 0 and inside.max() > 0:
            longest = inside.max()
            j = index[:t][inside == longest].max()
            predicted_ids[t], match_lengths[t] = tokens[j + 1], longest
    return predicted_ids, match_lengths


def predict_rows(
    input_ids: torch.Tensor, lengths: torch.Tensor, automaton: AutomatonState
) -> tuple[torch.Tensor, torch.Tensor, AutomatonState]:
    """Run ``predict_by_definition`` on rows that go on from ``automaton``.

    The automaton returned holds the text alone; the native back end indexes it when needed.
    """
    predicted_ids = torch.full_like(input_ids, -1)  # [B, T]
    match_lengths = torch.zeros_like(input_ids)
    texts = []
    counters = torch.zeros_like(automaton.counters)
    for row, length in enumerate(lengths.tolist()):
        num_tokens, held, window = automaton.counters[row, [NUM_TOKENS, NUM_HELD, WINDOW]].tolist()
        text = torch.cat([automaton.tokens[row, :held].long(), input_ids[row, :length]])
        first = num_tokens - held
        ids, matched = predict_by_definition(text, first, window or None)
        predicted_ids[row, :length] = ids[held:]
        match_lengths[row, :length] = matched[held:]
        num_tokens += length
        start = 0 if window == 0 else max(0, ((num_tokens - 1) // window - 1) * window)
        texts.append(text[max(0, start - first) :])
        counters[row, NUM_TOKENS] = num_tokens
        counters[row, NUM_HELD] = texts[-1].shape[0]
        counters[row, WINDOW] = window
    capacity = max(automaton.tokens.shape[1], *(text.shape[0] for text in texts))
    tokens = automaton.tokens.new_zeros(len(texts), capacity)
    for row, text in enumerate(texts):
        tokens[row, : text.shape[0]] = text
    return (
        predicted_ids,
        match_lengths,
        AutomatonState(
            tokens=tokens,
            nodes=torch.zeros_like(automaton.nodes),
            splays=torch.zeros_like(automaton.splays),
            edges=torch.zeros_like(automaton.edges),
            counters=counters,
        ),
    )
