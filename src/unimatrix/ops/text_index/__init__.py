"""The text index: where the last units of a stream stood before, and its longest suffix."""

from typing import NamedTuple, cast

import torch
from torch import Tensor

from unimatrix.errors import InputError
from unimatrix.ops.backends import compiles_native, require_backend
from unimatrix.ops.checks import read_ids
from unimatrix.ops.operator import declare_operator
from unimatrix.ops.text_index.reference import scan_reference
from unimatrix.ops.text_index.state import (
    HAS_LOST_LETTER,
    KNOWN,
    MOST_COUNTED,
    NUM_KINDS,
    NUM_PLACES,
    NUM_RECENT,
    NUM_TOKENS,
    NUM_TOLD,
    NUM_UNITS,
    RUN_LENGTH,
    TIMES,
    TextIndex,
    choose_token_type,
    copy_index,
    empty_index,
    name_units,
    order_tokens,
    require_form,
)

__all__ = [
    "MOST_COUNTED",
    "NUM_KINDS",
    "NUM_PLACES",
    "NUM_RECENT",
    "Found",
    "TextIndex",
    "copy_index",
    "empty_index",
    "order_tokens",
    "rebuild_index",
    "search_new_text",
    "search_text",
]


class Found(NamedTuple):
    """What an index finds for every token.

    Attributes:
        places: [B, T, 5, 5] int32, where the last units stood before: for each place how many
            tokens it is back, how often its unit was remembered (at most 7), how many units were
            read after that one, its kind: 0 to 2 are the places of the rarest unit, 3 to 10 those
            of the others, and how many tokens ago the unit that sends there was known; -1 and four
            zeros for no place.
        new_units: [B, T] int32; bit i is set if the unit i units ago, i < 8, was not remembered
            when it was read.
        matches: [B, T, 2] int64, the token that followed the longest suffix that stood before, -1
            for none, and the length of the match.
    """

    places: Tensor
    new_units: Tensor
    matches: Tensor


@torch.compiler.disable  # type: ignore[untyped-decorator]
def search_text(
    input_ids: Tensor,
    *,
    initial: TextIndex,
    lengths: Tensor | None = None,
    in_place: bool = False,
    backend: str = "auto",
) -> tuple[Found, TextIndex]:
    """Return for every token where its last units stood before, and what followed its suffix.

    Equation: E25. A unit is a word of at most 64 letters or digits (three letters, or fewer with a
    digit; ASCII letters without case; any longer character is a letter), complete with the token
    behind it; two characters of a script that puts no spaces between words; or one token, where the
    tokens are no bytes. Its place is its last token. A unit is remembered until its first token is
    W tokens back. Of the last eight units those that were remembered when they were read are ranked
    by how often they were, the rarest first and of equals the latest. The first sends a position to
    its latest place, the one before that and the oldest; the others to their latest and their
    oldest, until there are five places.

    Equation: E10. For the largest m < M, then the largest j < t, with id_{j-m..j} = id_{t-m..t}
    and t - j <= W - M: id_{j+1} and the length m + 1; -1 and 0 if even id_t is new. M is 64, or
    W / 2 where that is less.
    Source: this project; E10 is the residual path of the paper, with a bound.

    Args:
        input_ids: [B, T] int64, ids that the index's tokens can hold; what stands at positions
            ``lengths[b]`` and after is not looked at.
        initial: the index to go on with, of which a new stream has an empty one.
        lengths: [B] int64 in 0 .. T, the real tokens that lead each row; ``None`` means T.
        in_place: change the tensors of ``initial``, which the caller then gives up.
        backend: ``auto`` is ``native``, or ``reference`` where kernels do not run here.

    Returns:
        What was found, on the device of ``input_ids``, and the index after each row's real tokens,
        on the CPU.

    Raises:
        InputError: if a shape, type or id is not as above, or the back end does not exist.

    Cost:
        About 2 ln W suffixes are visited a token. For words of a vocabulary and a window below
        32,768 at most 11.75 W + 1,520 bytes, 29 W for tokens; twice as many for longer windows.
        ``reference`` reads the whole window again in each call, at quadratic cost.

    Note:
        Rows run in parallel on the CPU. Deterministic and causal; any split of a stream gives the
        same. Not differentiable.
    """
    if backend == "auto":
        backend = "native" if compiles_native() else "reference"
    require_backend("indexed_attention", backend)
    ids, lengths = read_ids(input_ids, lengths, torch.iinfo(initial.tokens.dtype).max)
    batch, num_tokens = ids.shape
    window = initial.tokens.shape[1]
    require_form(initial, batch, window, name_units(initial), initial.tokens.dtype)
    index = TextIndex(*(x.cpu().contiguous() for x in initial)) if in_place else copy_index(initial)
    places = torch.zeros(batch, num_tokens, NUM_PLACES, NUM_TOLD, dtype=torch.int32)
    new_units = torch.zeros(batch, num_tokens, dtype=torch.int32)
    matches = torch.zeros(batch, num_tokens, 2, dtype=torch.int64)
    places[..., 0], matches[..., 0] = -1, -1
    if backend == "native":
        from unimatrix.ops.text_index.native import scan_native

        scan_native(ids, lengths, index, places, new_units, matches)
    else:
        scan_reference(ids, lengths, index, places, new_units, matches)
    return Found(*(x.to(input_ids.device) for x in (places, new_units, matches))), index


def _search_new_text(
    input_ids: Tensor, window: int, vocab_size: int, units: str
) -> tuple[Tensor, Tensor, Tensor]:
    index = empty_index(len(input_ids), window, vocab_size, units)
    found: Found = search_text(input_ids, initial=index, in_place=True)[0]
    return found.places, found.new_units, found.matches


def _list_found(input_ids: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    places = input_ids.new_empty(*input_ids.shape, NUM_PLACES, NUM_TOLD, dtype=torch.int32)
    new_units = input_ids.new_empty(input_ids.shape, dtype=torch.int32)
    return places, new_units, input_ids.new_empty(*input_ids.shape, 2)


search_new_text = declare_operator(
    "search_new_text", _search_new_text, shapes=_list_found, devices=None
)
"""Return what ``search_text`` finds in new streams, which a captured graph takes whole.

Args: input_ids [B, T] int64, and window, vocab_size and units as for ``empty_index``.
Returns: places [B, T, 5, 5] int32, new units [B, T] int32 and matches [B, T, 2] int64.
"""


def rebuild_index(
    index: TextIndex, num_tokens: Tensor, window: int, vocab_size: int, units: str
) -> TextIndex:
    """Return an index from elsewhere with its table and links built again from its tokens.

    Args:
        index: of which nothing is known.
        num_tokens: [B] int64, tokens of each stream.
        window: W.
        vocab_size: V.
        units: as for ``empty_index``.

    Raises:
        InputError: if its tensors do not have the shapes and types of such an index, a token is
            none of the vocabulary, there are more or fewer tokens than the stream has, or a place
            is none of the stream.
    """
    index = TextIndex(*(part.cpu() for part in index))
    dtype = choose_token_type(vocab_size)
    require_form(index, len(num_tokens), window, units, dtype)
    anew = empty_index(len(num_tokens), window, vocab_size, units)
    num_tokens = num_tokens.cpu()
    held = num_tokens.clamp(max=window)
    anew.counters[:, NUM_TOKENS] = num_tokens
    tokens = order_tokens(anew._replace(tokens=index.tokens))
    is_held = torch.arange(window) >= (window - held).unsqueeze(1)
    places, times = index.recent_units[..., :TIMES], index.recent_units[..., TIMES]
    num_units = index.counters[:, NUM_UNITS]
    if int(tokens.max()) >= vocab_size:
        raise InputError(
            f"the text index holds {int(tokens.max())}, and the vocabulary has {vocab_size} "
            "tokens; pass a cache that this model has made"
        )
    is_unsound = ((tokens >= 0) != is_held).any()
    is_unsound |= (places >= num_tokens.view(-1, 1, 1)).any() or int(places.min()) < -1
    known = index.recent_units[..., KNOWN]
    is_unsound |= (known >= num_tokens.unsqueeze(1)).any() or int(known.min()) < -1
    is_unsound |= int(times.min()) < 0 or int(num_units.min()) < 0
    if is_unsound:
        raise InputError(
            "the text index does not hold the last tokens of the stream and what was found for "
            "them; pass a cache that this model has made"
        )
    cut = index.counters[:, HAS_LOST_LETTER] != 0
    anew.counters[:, NUM_TOKENS] = num_tokens - held
    # Letters that go on with a word whose beginning is forgotten are no word.
    anew.counters[:, RUN_LENGTH] = cut * window
    anew.counters[:, HAS_LOST_LETTER] = cut
    first = ((window - held).unsqueeze(1) + torch.arange(window)).clamp(max=window - 1)
    text = tokens.gather(1, first).clamp_min(0)
    anew = cast("TextIndex", search_text(text, initial=anew, lengths=held, in_place=True)[1])
    anew.counters[:, NUM_UNITS] = num_units
    return anew._replace(recent_units=index.recent_units)
