"""Predictions of a suffix automaton for a whole stream, for windows that are cut from it."""

from collections.abc import Iterator

import numpy as np
import torch

from unimatrix.data import ByteStream, StreamMatches
from unimatrix.ops.suffix_automaton import SuffixPrediction, SuffixState, predict_from_suffix
from unimatrix.tokenization import VOCAB_SIZE

_CHUNK_TOKENS = 2**20


def match_stream(stream: ByteStream, window: int | None) -> StreamMatches:
    """Return what a suffix automaton predicts after every token of a stream.

    Args:
        stream: what to read, from BOS on.
        window: the automaton's bound, as in ``predict_from_suffix``; ``None`` is none.

    Cost:
        6 bytes a token for the result, and the automaton itself while it reads.
    """
    predicted = np.empty(stream.num_tokens, np.int16)
    lengths = np.empty(stream.num_tokens, np.int32)
    for place, found, _ in _scan_chunks(stream, stream.num_tokens, window):
        predicted[place] = found.predicted_ids[0].numpy()
        lengths[place] = found.match_lengths[0].numpy()
    return StreamMatches(predicted, lengths)


def read_with_automaton(
    stream: ByteStream, num_tokens: int, window: int | None
) -> SuffixState | None:
    """Return the automaton after the first tokens of a stream, BOS included, if there are any."""
    last: SuffixState | None = None
    for _, _, automaton in _scan_chunks(stream, num_tokens, window):
        last = automaton
    return last


def _scan_chunks(
    stream: ByteStream, num_tokens: int, window: int | None
) -> Iterator[tuple[slice, SuffixPrediction, SuffixState]]:
    """Yield the tokens read, what was predicted there, and the automaton after them."""
    automaton: SuffixState | None = None
    for start in range(0, num_tokens, _CHUNK_TOKENS):
        stop = min(start + _CHUNK_TOKENS, num_tokens)
        ids = torch.from_numpy(stream.read_tokens(start, stop))[None]
        found, automaton = predict_from_suffix(
            ids, initial=automaton, window=window, vocab_size=VOCAB_SIZE, in_place=True
        )
        assert automaton is not None
        yield slice(start, stop), found, automaton
