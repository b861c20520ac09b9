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
    WINDOW,
    AutomatonState,
    copy_automaton,
    count_live_bytes,
    empty_automaton,
    keep_text,
)

__all__ = [
    "AutomatonState",
    "SuffixPrediction",
    "count_live_bytes",
    "empty_automaton",
    "keep_text",
    "match_suffixes",
    "predict_from_suffix",
]


_MOST_ROOM = 1 << 16
"""Tokens up to which an automaton that is not returned has room for any text from the start."""


class SuffixPrediction(NamedTuple):
    """What the longest earlier suffix says about each position."""

    predicted_ids: torch.Tensor  # [B, T] int64, -1 for no match
    match_lengths: torch.Tensor  # [B, T] int64, 0 for no match


@torch.compiler.disable  # type: ignore[untyped-decorator]
def predict_from_suffix(
    input_ids: torch.Tensor,
    *,
    lengths: torch.Tensor | None = None,
    initial: AutomatonState | None = None,
    window: int | None = None,
    in_place: bool = False,
    keeps_state: bool = True,
    backend: str = "auto",
) -> tuple[SuffixPrediction, AutomatonState | None]:
    """Predict after every token what followed the longest suffix that occurred before.

    Equation: E10. For the largest m, then the largest j < t, with id_{j-m..j} = id_{t-m..t}:
        p_t = id_{j+1} and the match length is m + 1; p_t = -1 and 0 if even id_t is new.
        With a window W, j - m >= max(0, (t // W - 1) W) as well.
    Source: the residual path; what RWKV-8 calls ROSA.

    Args:
        input_ids: ``[B, T]`` int64, ids in 0 .. 2**31 - 1; what stands at positions
            ``lengths[b]`` and after is not looked at.
        lengths: ``[B]`` int64 in 0 .. T, the real tokens that lead each row; ``None`` means T.
        initial: the automaton to go on with, rows as in ``input_ids``; ``None`` starts new streams.
        window: W in tokens, that of ``initial``; ``None`` means unbounded.
        in_place: change the tensors of ``initial``, which the caller then gives up.
        keeps_state: return the automaton; without it, rows no longer than the window are answered
            by an automaton of their own size instead of the window's.
        backend: ``auto`` is ``native``, or ``reference`` where kernels do not run here.

    Returns:
        The prediction, ``[B, T]`` int64 on the device of ``input_ids``, -1 and 0 at padding, and
        the automaton after each row's real tokens, on the CPU, ``None`` unless it is kept. Unless
        ``in_place``, it shares nothing with ``initial``, which is left as it was.

    Raises:
        InputError: if a shape, type or id is not as above, ``window`` is not in 1 .. 2**29 or
            not the one ``initial`` was built with, a stream without a window passes 2**30 tokens,
            or the back end does not exist.

    Cost:
        Amortised O(log n) a token for any text of n tokens; a single token may cost O(match
        length). Without a window, at most 38 bytes a token of a novel and 62 at worst, twice that
        after growing; with one, 124 W bytes a row for ever and every token is indexed twice.
        Unless ``in_place``, ``initial`` is copied.

    Note:
        ``reference`` is quadratic. Rows run in parallel on the CPU. Deterministic and causal; any
        split of a stream gives the same predictions. Not differentiable.
    """
    if backend == "auto":
        backend = "native" if compiles_native() else "reference"
    require_backend("suffix_automaton", backend)
    real_ids, lengths = read_ids(input_ids, lengths, 2**31 - 1)
    if initial is None:
        # Nothing is dropped from the first two generations.
        if not keeps_state and window is not None and input_ids.shape[1] <= 2 * window:
            window = None
        batch, num_tokens = input_ids.shape
        room = {} if keeps_state or num_tokens > _MOST_ROOM else {"num_tokens": num_tokens}
        automaton = empty_automaton(batch, window, **room)
    else:
        _check_initial(initial, input_ids.shape[0], window)
        if in_place:
            automaton = AutomatonState(*(x.to("cpu").contiguous() for x in initial))
        else:
            automaton = copy_automaton(initial)
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


def _check_initial(initial: AutomatonState, batch: int, window: int | None) -> None:
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
    built_with = int(initial.counters[0, WINDOW]) or None
    if window != built_with:
        raise InputError(f"window is {window} but initial was built with {built_with}; pass that.")
