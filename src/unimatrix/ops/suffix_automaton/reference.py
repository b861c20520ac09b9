"""The definition of the longest earlier suffix, at quadratic cost: the oracle of the others."""

import torch

from unimatrix.ops.suffix_automaton.storage import NUM_HELD, NUM_TOKENS, AutomatonState


def predict_by_definition(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Find, after every token of one stream, the longest suffix that occurred before.

    Equation: E10. For the largest m, then the largest j < t, with id_{j-m..j} = id_{t-m..t}:
        p_t = id_{j+1} and the match length is m + 1; p_t = -1 and 0 if even id_t is new.
    Source: paper, residual path; RWKV-8 ROSA.

    Args:
        tokens: ``[n]`` int64, the whole stream.

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
        before = torch.cat([common.new_zeros(1), common[:-1]])
        common = torch.where((tokens == tokens[t]) & (index < t), before + 1, 0)
        longest = common.max()
        if longest > 0:
            predicted_ids[t] = tokens[index[common == longest].max() + 1]
            match_lengths[t] = longest
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
        num_tokens, held = automaton.counters[row, [NUM_TOKENS, NUM_HELD]].tolist()
        texts.append(torch.cat([automaton.tokens[row, :held].long(), input_ids[row, :length]]))
        ids, matched = predict_by_definition(texts[-1])
        predicted_ids[row, :length] = ids[held:]
        match_lengths[row, :length] = matched[held:]
        counters[row, NUM_TOKENS] = num_tokens + length
        counters[row, NUM_HELD] = len(texts[-1])
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
