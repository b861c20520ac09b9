"""The suffix automaton: what followed the longest suffix of the stream that occurred before."""

from typing import NamedTuple

import torch
from torch import Tensor

from unimatrix.errors import InputError
from unimatrix.ops.backends import compiles_native, require_backend
from unimatrix.ops.checks import read_ids, require_dtype, require_shape
from unimatrix.ops.operator import declare_operator
from unimatrix.ops.suffix_automaton.reference import predict_rows
from unimatrix.ops.suffix_automaton.storage import (
    DTYPES,
    LETTERS,
    NUM_COUNTERS,
    AutomatonState,
    copy_automaton,
    count_live_bytes,
    empty_automaton,
    keep_text,
)
from unimatrix.ops.text_index import TextIndex, empty_index, search_text

__all__ = [
    "AutomatonState",
    "SuffixPrediction",
    "SuffixState",
    "copy_automaton",
    "count_live_bytes",
    "empty_automaton",
    "keep_text",
    "match_suffixes",
    "predict_from_suffix",
]


_MOST_ROOM = 1 << 16
"""Tokens up to which an automaton that is not returned has room for any text from the start."""


SuffixState = AutomatonState | TextIndex
"""What is carried: the automaton of the whole stream, or with a window the index of its end."""


class SuffixPrediction(NamedTuple):
    """What the longest earlier suffix says about each position."""

    predicted_ids: torch.Tensor  # [B, T] int64, -1 for no match
    match_lengths: torch.Tensor  # [B, T] int64, 0 for no match


@torch.compiler.disable  # type: ignore[untyped-decorator]
def predict_from_suffix(
    input_ids: torch.Tensor,
    *,
    lengths: torch.Tensor | None = None,
    initial: SuffixState | None = None,
    window: int | None = None,
    vocab_size: int = 2**31,
    in_place: bool = False,
    keeps_state: bool = True,
    backend: str = "auto",
) -> tuple[SuffixPrediction, SuffixState | None]:
    """Predict after every token what followed the longest suffix that occurred before.

    Equation: E10. For the largest m, then the largest j < t, with id_{j-m..j} = id_{t-m..t}:
        p_t = id_{j+1} and the match length is m + 1; p_t = -1 and 0 if even id_t is new.
        With a window W, m < M and t - j <= W - M as well; M is 64, or W / 2 where that is less.
    Source: the residual path; what RWKV-8 calls ROSA.

    Args:
        input_ids: ``[B, T]`` int64, ids in 0 .. 2**31 - 1; what stands at positions
            ``lengths[b]`` and after is not looked at.
        lengths: ``[B]`` int64 in 0 .. T, the real tokens that lead each row; ``None`` means T.
        initial: what a call with the same window has returned, rows as in ``input_ids``; ``None``
            starts new streams.
        window: W in tokens, of which no more are kept; ``None`` means unbounded.
        vocab_size: V, above all ids: below 2**15 a window keeps a token in two bytes.
        in_place: change the tensors of ``initial``, which the caller then gives up.
        keeps_state: return what goes on.
        backend: ``auto`` is ``native``, or ``reference`` where kernels do not run here.

    Returns:
        The prediction, ``[B, T]`` int64 on the device of ``input_ids``, -1 and 0 at padding, and
        the automaton after each row's real tokens, with a window the index of the last W, on the
        CPU, ``None`` unless it is kept. Unless ``in_place``, it shares nothing with ``initial``,
        which is left as it was.

    Raises:
        InputError: if a shape, type or id is not as above, ``window`` is not in 1 .. 2**30 - 1 or
            not the one ``initial`` was built with, a stream without a window passes 2**30 tokens,
            or the back end does not exist.

    Cost:
        Without a window amortised O(log n) a token for any text of n tokens; a single token may
        cost O(match length); at most 38 bytes a token of a novel and 62 at worst, twice that after
        growing. With one, about 2 ln W visits a token and 6 to 12 bytes a row and token of it.
        Unless ``in_place``, ``initial`` is copied.

    Note:
        ``reference`` is quadratic. Rows run in parallel on the CPU. Deterministic and causal; any
        split of a stream gives the same predictions. Not differentiable.
    """
    if backend == "auto":
        backend = "native" if compiles_native() else "reference"
    require_backend("suffix_automaton", backend)
    if window is not None:
        prediction, index = _predict_from_window(
            input_ids, lengths, initial, window, vocab_size, in_place, backend
        )
        return prediction, index if keeps_state else None
    real_ids, lengths = read_ids(input_ids, lengths, 2**31 - 1)
    if initial is None:
        batch, num_tokens = input_ids.shape
        has_room = not keeps_state and num_tokens <= _MOST_ROOM
        automaton = empty_automaton(batch, *([num_tokens] if has_room else []))
    else:
        automaton = _require_automaton(initial, input_ids.shape[0])
        if in_place:
            automaton = AutomatonState(*(x.to("cpu").contiguous() for x in automaton))
        else:
            automaton = copy_automaton(automaton)
    if backend == "native":
        from unimatrix.ops.suffix_automaton.native import scan_native

        predicted_ids, match_lengths, automaton = scan_native(real_ids, lengths, automaton)
    else:
        predicted_ids, match_lengths, automaton = predict_rows(real_ids, lengths, automaton)
    device = input_ids.device
    prediction = SuffixPrediction(predicted_ids.to(device), match_lengths.to(device))
    return prediction, automaton if keeps_state else None


def _match_suffixes(input_ids: Tensor, window: int | None) -> Tensor:
    prediction, _ = predict_from_suffix(input_ids, window=window, keeps_state=False)
    return torch.stack(prediction, dim=-1)


match_suffixes = declare_operator(
    "match_suffixes",
    _match_suffixes,
    shapes=lambda input_ids, window: input_ids.new_empty(*input_ids.shape, 2),
    devices=None,
)
"""Return what ``predict_from_suffix`` predicts for new streams, which a captured graph takes whole.

Args: input_ids [B, T] int64, and the window. Returns: ids and match lengths, [B, T, 2] int64.
"""


def _predict_from_window(
    input_ids: Tensor,
    lengths: Tensor | None,
    initial: SuffixState | None,
    window: int,
    vocab_size: int,
    in_place: bool,
    backend: str,
) -> tuple[SuffixPrediction, TextIndex]:
    """Predict from the last W tokens; see ``predict_from_suffix``."""
    if initial is None:
        initial, in_place = empty_index(len(input_ids), window, vocab_size, "none"), True
    elif not isinstance(initial, TextIndex) or initial.tokens.shape[1] != window:
        built_with = initial.tokens.shape[1] if isinstance(initial, TextIndex) else None
        raise InputError(f"window is {window} but initial was built with {built_with}; pass that.")
    found, index = search_text(
        input_ids, initial=initial, lengths=lengths, in_place=in_place, backend=backend
    )
    return SuffixPrediction(*found.matches.unbind(dim=-1)), index


def _require_automaton(initial: SuffixState, batch: int) -> AutomatonState:
    """Raise ``InputError`` unless this is an automaton without a window, of so many rows."""
    if isinstance(initial, TextIndex):
        built_with = initial.tokens.shape[1]
        raise InputError(f"window is None but initial was built with {built_with}; pass that.")
    if initial.counters.shape[0] != batch:
        raise InputError(
            f"initial has {initial.counters.shape[0]} rows; pass one for each of the {batch} rows "
            "of input_ids."
        )
    sizes = {"B": batch, "8": 8, "2": 2, "3": 3, "10": NUM_COUNTERS}
    for name, letters in LETTERS.items():
        tensor = getattr(initial, name)
        require_shape(f"initial.{name}", tensor, letters, sizes)
        require_dtype(f"initial.{name}", tensor, DTYPES.get(name, torch.int32))
    return initial
